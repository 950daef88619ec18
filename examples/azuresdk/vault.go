package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"

	"github.com/aztoso/mitoken/imdsfake"
	"github.com/coreos/go-oidc/v3/oidc"
)

// newVault returns a vault as far as it takes to read a secret: it tells who comes
// without a token whose it wants (a challenge that clients ask for), and verifies
// the token as Key Vault does.
func newVault(azure *imdsfake.Handler, secrets map[string]string) *httptest.Server {
	ctx := oidc.ClientContext(context.Background(), &http.Client{Transport: azure})
	keys := oidc.NewRemoteKeySet(ctx, "https://login.microsoftonline.com/common/discovery/keys")
	verifier := oidc.NewVerifier(azure.Issuer(), keys, &oidc.Config{ClientID: "https://vault.azure.net"})
	challenge := fmt.Sprintf(`Bearer authorization="https://login.microsoftonline.com/%s", resource="https://vault.azure.net"`,
		azure.Directory().Tenant)
	var vault *httptest.Server
	vault = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if _, err := verifier.Verify(ctx, token); err != nil {
			w.Header().Set("WWW-Authenticate", challenge)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		name, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/secrets/"), "/")
		value, ok := secrets[name]
		w.Header().Set("Content-Type", "application/json")
		if !ok {
			w.WriteHeader(http.StatusNotFound)
			_ = json.NewEncoder(w).Encode(map[string]any{"error": map[string]string{
				"code": "SecretNotFound", "message": "A secret with (name/id) " + name + " was not found in this key vault."}})
			return
		}
		_ = json.NewEncoder(w).Encode(map[string]string{"value": value, "id": vault.URL + "/secrets/" + name + "/1"})
	}))
	return vault
}
