package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/coreos/go-oidc/v3/oidc"
)

// This file is the protected service's half of the story. It knows nothing of
// mitoken: it would do the same for a client in any other language.

// A guard lets in whom the service is meant for. It checks what RFC 9068 and
// Microsoft's "Secure applications and APIs by validating claims" ask for:
// signature, issuer, audience, lifetime, tenant, and that the caller is an
// application, not one that acts for a user.
type guard struct {
	verifier *oidc.IDTokenVerifier
	audience string // the service's App ID URI
	tenant   string // the only one whose tokens count
}

// newGuard returns a guard that fetches the tenant's public keys from keysURL,
// when a token first needs them and when they have been rolled. The context is
// that of all these fetches, so it must not end; oidc.ClientContext makes one
// that brings an HTTP client along.
//
// Entra's keys are at https://login.microsoftonline.com/{tenant}/discovery/keys,
// and the issuer is https://sts.windows.net/{tenant}/ as long as the service's
// registration does not ask for tokens of version 2.
func newGuard(ctx context.Context, audience, tenant, issuer, keysURL string) *guard {
	keys := oidc.NewRemoteKeySet(ctx, keysURL)
	return &guard{
		verifier: oidc.NewVerifier(issuer, keys, &oidc.Config{
			ClientID:             audience,
			SupportedSigningAlgs: []string{oidc.RS256}, // Entra's; "none" is never one
		}),
		audience: audience,
		tenant:   tenant,
	}
}

// A caller is who sent a request.
type caller struct {
	AppID    string   `json:"appid"` // client ID of its application
	ObjectID string   `json:"oid"`   // its object ID: no two in the tenant share one, ever
	Roles    []string `json:"roles"` // the app roles that it was assigned
}

// A handler answers a request of a caller that was let in.
type handler func(http.ResponseWriter, *http.Request, caller)

// require returns a handler for those who have an app role. The others get 401
// if the service does not know who they are, and 403 if it does.
func (g *guard) require(role string, next handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token := bearerToken(r)
		if token == "" {
			g.refuse(w, http.StatusUnauthorized, "")
			return
		}
		c, err := g.verify(r.Context(), token)
		switch {
		case err != nil:
			// Why it is invalid is for the service's log, not for whoever sent it.
			g.refuse(w, http.StatusUnauthorized, "invalid_token")
		case !slices.Contains(c.Roles, role):
			g.refuse(w, http.StatusForbidden, "insufficient_scope")
		default:
			next(w, r, c)
		}
	})
}

// verify returns whom a token was issued to, if it is good for this service.
func (g *guard) verify(ctx context.Context, token string) (caller, error) {
	verified, err := g.verifier.Verify(ctx, token) // signature, alg, iss, aud, exp, nbf
	if err != nil {
		return caller{}, err
	}
	var claims struct {
		caller
		Subject string `json:"sub"`
		Tenant  string `json:"tid"`
		Scopes  string `json:"scp"`
	}
	if err := verified.Claims(&claims); err != nil {
		return caller{}, err
	}
	switch {
	case claims.Tenant != g.tenant:
		return caller{}, fmt.Errorf("tid is %q: another tenant's token", claims.Tenant)
	case claims.Scopes != "" || claims.ObjectID == "" || claims.ObjectID != claims.Subject:
		return caller{}, errors.New("not an application's own token")
	}
	return claims.caller, nil
}

// refuse answers with a challenge (RFC 6750, section 3), which has no error code
// where there was no token to find fault with.
func (g *guard) refuse(w http.ResponseWriter, status int, code string) {
	challenge := fmt.Sprintf("Bearer realm=%q", g.audience)
	if code != "" {
		challenge += fmt.Sprintf(", error=%q", code)
	}
	w.Header().Set("WWW-Authenticate", challenge)
	http.Error(w, http.StatusText(status), status)
}

// bearerToken returns the token of a request, or "". A second Authorization
// header is none: who is to say which of them counts?
func bearerToken(r *http.Request) string {
	values := r.Header.Values("Authorization")
	if len(values) != 1 {
		return ""
	}
	scheme, token, _ := strings.Cut(values[0], " ")
	if !strings.EqualFold(scheme, "Bearer") { // RFC 9110, section 11.1
		return ""
	}
	return strings.TrimSpace(token)
}
