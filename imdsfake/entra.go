package imdsfake

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"encoding/base64"
	"math/big"
	"net/http"
	"sync"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// This file is Microsoft Entra, as far as IMDS and the services have to do with
// it: it issues tokens and publishes the keys that they are signed with.

// signingKey signs the tokens of all Handlers. It is made when the first one
// needs it, and not embedded: a published private key would, one day, be trusted
// somewhere.
var signingKey = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic("imdsfake: " + err.Error())
	}
	return key
})

// keyID is the kid and x5t of the key. Entra's is the thumbprint of a
// certificate; this is one of the bare key.
var keyID = sync.OnceValue(func() string {
	sum := sha1.Sum(x509.MarshalPKCS1PublicKey(&signingKey().PublicKey))
	return base64.RawURLEncoding.EncodeToString(sum[:])
})

// issueKey is what IMDS caches tokens by.
type issueKey struct{ objectID, resource string }

// issuedToken is a token that was issued. Like Entra's, its times are whole
// seconds.
type issuedToken struct {
	value          string
	issued, expiry time.Time
}

// issue returns a token, which is a new one unless there is one that is to be
// kept longer.
func (h *Handler) issue(id Identity, app App, resource string) issuedToken {
	now := time.Now()
	key := issueKey{id.ObjectID, resource}
	h.mu.Lock()
	tok, ok := h.kept(key, now)
	roles := h.tenant.rolesOf(id, app)
	h.mu.Unlock()
	if ok {
		return tok
	}
	tok = h.sign(id, roles, resource, now) // a millisecond, for which nobody else waits
	h.mu.Lock()
	defer h.mu.Unlock()
	if other, ok := h.kept(key, now); ok {
		return other // of a request at the same time
	}
	h.issued[key] = tok
	return tok
}

// kept returns the token that a request gets again. h.mu is held.
func (h *Handler) kept(key issueKey, now time.Time) (issuedToken, bool) {
	tok, ok := h.issued[key]
	return tok, ok && now.Sub(tok.issued) < h.KeepFor && now.Before(tok.expiry)
}

// sign makes a token with the claims of "Access token claims reference"
// (Microsoft), version 1.0, that managed identities have.
func (h *Handler) sign(id Identity, roles []string, resource string, now time.Time) issuedToken {
	lifetime := h.Lifetime
	if lifetime == 0 {
		lifetime = 24 * time.Hour
	}
	issued := now.Truncate(time.Second)
	expiry := issued.Add(lifetime)
	claims := jwt.MapClaims{
		"aud":       resource,
		"iss":       h.tenant.issuer(),
		"iat":       issued.Unix(),
		"nbf":       issued.Unix(),
		"exp":       expiry.Unix(),
		"aio":       unique(),
		"appid":     id.ClientID,
		"appidacr":  "2", // it proved itself with a certificate
		"idp":       h.tenant.issuer(),
		"idtyp":     "app",
		"oid":       id.ObjectID,
		"rh":        unique(),
		"sub":       id.ObjectID,
		"tid":       h.tenant.id,
		"uti":       unique(),
		"ver":       "1.0",
		"xms_mirid": id.ResourceID,
	}
	if len(roles) > 0 {
		claims["roles"] = roles
	}
	tok := jwt.NewWithClaims(jwt.SigningMethodRS256, claims)
	tok.Header["kid"], tok.Header["x5t"] = keyID(), keyID()
	value, err := tok.SignedString(signingKey())
	if err != nil {
		panic("imdsfake: " + err.Error())
	}
	return issuedToken{value, issued, expiry}
}

// unique returns a value for the claims that are opaque, and never the same.
func unique() string {
	return base64.RawURLEncoding.EncodeToString([]byte(rand.Text())[:16])
}

// published answers a request for what Entra publishes: the metadata of OpenID
// Connect Discovery 1.0, section 4, and the keys (RFC 7517).
func (h *Handler) published(r *http.Request) answer {
	base := "http://" + r.Host
	if r.Host == "" {
		base = "http://" + r.URL.Host
	}
	tenant := "/" + h.tenant.id
	switch r.URL.Path {
	case tenant + "/.well-known/openid-configuration":
		return jsonAnswer(http.StatusOK, map[string]any{
			"issuer":                                h.tenant.issuer(),
			"jwks_uri":                              base + tenant + "/discovery/keys",
			"authorization_endpoint":                base + tenant + "/oauth2/authorize",
			"token_endpoint":                        base + tenant + "/oauth2/token",
			"response_types_supported":              []string{"token"},
			"subject_types_supported":               []string{"pairwise"},
			"id_token_signing_alg_values_supported": []string{"RS256"},
		})
	case tenant + "/discovery/keys", "/common/discovery/keys":
		key := signingKey().PublicKey
		encode := base64.RawURLEncoding.EncodeToString
		return jsonAnswer(http.StatusOK, map[string]any{"keys": []map[string]string{{
			"kty": "RSA", "use": "sig", "alg": "RS256", "kid": keyID(), "x5t": keyID(),
			"n": encode(key.N.Bytes()), "e": encode(big.NewInt(int64(key.E)).Bytes()),
			"issuer": h.tenant.issuer(),
		}}})
	}
	return refusal(http.StatusNotFound, "not_found", "There is nothing at "+r.URL.Path)
}
