package imdsfake

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"math/big"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// This file is Microsoft Entra, as far as IMDS and the services have to do with
// it: it signs tokens and publishes the keys that they are signed with.

// A signingKey is one of Entra's, with the certificate that it is published with.
type signingKey struct {
	private     *rsa.PrivateKey
	certificate []byte
	id          string // the thumbprint of the certificate: the kid and x5t
}

// processKey signs the tokens of all Handlers, until they rotate theirs. It is
// made when the first one needs it, and not embedded: a published private key
// would, one day, be trusted somewhere.
var processKey = sync.OnceValue(newSigningKey)

func newSigningKey() *signingKey {
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic("imdsfake: " + err.Error())
	}
	certificate := selfSigned(&x509.Certificate{
		Subject: pkix.Name{CommonName: "accounts.accesscontrol.windows.net"},
	}, private.Public(), private)
	sum := sha1.Sum(certificate)
	return &signingKey{private, certificate, base64.RawURLEncoding.EncodeToString(sum[:])}
}

// selfSigned returns a certificate that is valid in this century, be the clock
// that of a testing/synctest bubble.
func selfSigned(template *x509.Certificate, public, private any) []byte {
	template.SerialNumber = big.NewInt(1)
	template.NotBefore = time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC)
	template.NotAfter = time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC)
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	if err != nil {
		panic("imdsfake: " + err.Error())
	}
	return certificate
}

// publishedKeys returns the keys that are, the one that signs first.
func (h *Handler) publishedKeys() []*signingKey {
	h.mu.Lock()
	keys := h.keys
	h.mu.Unlock()
	if keys == nil {
		return []*signingKey{processKey()}
	}
	return keys
}

// RotateKey has tokens signed with a new key from then on. The key before it
// stays published, so that tokens of it can be verified; the one before that does
// not.
func (h *Handler) RotateKey() {
	before, next := processKey(), newSigningKey()
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.keys != nil {
		before = h.keys[0]
	}
	h.keys = []*signingKey{next, before}
}

// sign makes a token with the claims that managed identities have, of "Access
// token claims reference" (Microsoft). h.mu is not held.
func (h *Handler) sign(c *call, id Identity, app *App, roles []string, now time.Time) (issuedToken, jwt.MapClaims) {
	issued := now.Truncate(time.Second)
	expiry := issued.Add(h.lifetimeFor(c, app))
	claims := jwt.MapClaims{
		"iat":   issued.Unix(),
		"nbf":   issued.Unix(),
		"exp":   expiry.Unix(),
		"aio":   unique(),
		"idtyp": "app",
		"oid":   id.ObjectID,
		"rh":    unique(),
		"sub":   id.ObjectID,
		"tid":   h.tenant.id,
		"uti":   unique(),
	}
	if id.ResourceID != "" { // a service principal has none
		claims["xms_mirid"] = id.ResourceID
	}
	if id.ResourceID != "" && !id.SystemAssigned {
		claims["xms_az_rid"] = h.tenant.hostID() // where it is used
	}
	if len(roles) > 0 {
		claims["roles"] = roles
	}
	if app.TokenVersion == 2 {
		claims["aud"], claims["iss"], claims["ver"] = app.ClientID, h.tenant.issuerV2(), "2.0"
		claims["azp"], claims["azpacr"] = id.ClientID, c.proof
	} else {
		claims["aud"], claims["iss"], claims["ver"] = c.entry.Resource, h.tenant.issuer(), "1.0"
		claims["appid"], claims["appidacr"], claims["idp"] = id.ClientID, c.proof, h.tenant.issuer()
	}
	key := h.publishedKeys()[0]
	tok := jwt.NewWithClaims(jwt.SigningMethodRS256, claims)
	tok.Header["kid"], tok.Header["x5t"] = key.id, key.id
	value, err := tok.SignedString(key.private)
	if err != nil {
		panic("imdsfake: " + err.Error())
	}
	return issuedToken{value, issued, expiry}, claims
}

// unique returns a value for the claims that are opaque, and never the same.
func unique() string {
	return base64.RawURLEncoding.EncodeToString([]byte(rand.Text())[:16])
}

// verify returns the claims of a token of this tenant.
func (h *Handler) verify(token string) (jwt.MapClaims, error) {
	claims := jwt.MapClaims{}
	_, err := jwt.ParseWithClaims(token, claims, func(t *jwt.Token) (any, error) {
		for _, key := range h.publishedKeys() {
			if key.id == t.Header["kid"] {
				return key.private.Public(), nil
			}
		}
		return nil, jwt.ErrTokenUnverifiable
	}, jwt.WithValidMethods([]string{"RS256"}), jwt.WithIssuer(h.tenant.issuer()), jwt.WithExpirationRequired())
	return claims, err
}

// published answers a request for what Entra publishes: the metadata of OpenID
// Connect Discovery 1.0, section 4, and the keys (RFC 7517).
func (h *Handler) published(c *call) answer {
	base := c.base()
	tenant, path, _ := strings.Cut(strings.TrimPrefix(c.URL.Path, "/"), "/")
	if tenant != h.tenant.id && tenant != "common" && tenant != "organizations" {
		path = ""
	}
	if path == strings.TrimPrefix(entraPath, "/") {
		return refusal(c, invalid("AADSTS50059: No tenant-identifying information found; the tenant here is %s", h.tenant.id))
	}
	if c.Method != http.MethodGet && c.Method != http.MethodHead {
		return refusal(c, &problem{status: 405, code: "method_not_allowed", text: "Only GET is supported"})
	}
	c.entry.Reason = "as published"
	switch path {
	case ".well-known/openid-configuration":
		return jsonAnswer(http.StatusOK, metadata(h.tenant.issuer(), base+"/"+tenant, ""))
	case "v2.0/.well-known/openid-configuration":
		return jsonAnswer(http.StatusOK, metadata(h.tenant.issuerV2(), base+"/"+tenant, "/v2.0"))
	case "discovery/instance":
		return h.discovery(c)
	case "discovery/keys":
		return h.keySet(h.tenant.issuer())
	case "discovery/v2.0/keys":
		return h.keySet(h.tenant.issuerV2())
	}
	return refusal(c, &problem{status: 404, code: "not_found", text: "There is nothing at " + c.URL.Path})
}

// base is where the fake was asked.
func (c *call) base() string {
	scheme, host := "http", c.Host
	if c.TLS != nil || c.URL.Scheme == "https" {
		scheme = "https"
	}
	if host == "" {
		host = c.URL.Host
	}
	return scheme + "://" + host
}

func metadata(issuer, tenant, version string) map[string]any {
	return map[string]any{
		"issuer":                                issuer,
		"jwks_uri":                              tenant + "/discovery" + version + "/keys",
		"authorization_endpoint":                tenant + "/oauth2" + version + "/authorize",
		"token_endpoint":                        tenant + "/oauth2" + version + "/token",
		"response_types_supported":              []string{"token"},
		"subject_types_supported":               []string{"pairwise"},
		"id_token_signing_alg_values_supported": []string{"RS256"},
	}
}

func (h *Handler) keySet(issuer string) answer {
	encode := base64.RawURLEncoding.EncodeToString
	var keys []any
	for _, k := range h.publishedKeys() {
		public := k.private.PublicKey
		keys = append(keys, map[string]any{
			"kty": "RSA", "use": "sig", "kid": k.id, "x5t": k.id,
			"n": encode(public.N.Bytes()), "e": encode(big.NewInt(int64(public.E)).Bytes()),
			"x5c":    []string{base64.StdEncoding.EncodeToString(k.certificate)},
			"issuer": issuer,
		})
	}
	return jsonAnswer(http.StatusOK, map[string]any{"keys": keys})
}

// serverCertificate is what a Handler is served over https with.
var serverCertificate = sync.OnceValue(func() tls.Certificate {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic("imdsfake: " + err.Error())
	}
	certificate := selfSigned(&x509.Certificate{
		Subject: pkix.Name{CommonName: "imdsfake"},
		DNSNames: []string{"localhost", "login.microsoftonline.com", "sts.windows.net",
			"graph.microsoft.com"},
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		IsCA:                  true, // so that a client can be told to trust it
		BasicConstraintsValid: true,
	}, private.Public(), private)
	leaf, err := x509.ParseCertificate(certificate)
	if err != nil {
		panic("imdsfake: " + err.Error())
	}
	return tls.Certificate{Certificate: [][]byte{certificate}, PrivateKey: private, Leaf: leaf}
})

// Certificate is what to serve a Handler over https with. It is made when it is
// first asked for, the same one for all Handlers of a process, for localhost and
// for the names of Entra and Microsoft Graph.
func (h *Handler) Certificate() tls.Certificate { return serverCertificate() }

// thumbprint is that of the certificate, as Service Fabric tells it its clients.
func thumbprint() string {
	sum := sha1.Sum(serverCertificate().Certificate[0])
	return strings.ToUpper(hex.EncodeToString(sum[:]))
}
