package main

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/coreos/go-oidc/v3/oidc"

	"github.com/aztoso/mitoken"
	"github.com/aztoso/mitoken/imdsfake"
)

// elsewhere is another service of the tenant, with the same role.
const elsewhere = "https://other.aztoso.com"

var guest = azidentity.ClientID(guestID)

func TestService(t *testing.T) {
	// In a bubble a token of yesterday costs no day, and the fake no socket.
	synctest.Test(t, func(t *testing.T) {
		azure, stranger := newTenant(t, tenant), newTenant(t, guestID)
		expired := issue(t, azure, nil, resource)
		time.Sleep(25 * time.Hour)
		good := issue(t, azure, nil, resource)
		head, tail, _ := strings.Cut(good, ".")
		payload, _, _ := strings.Cut(tail, ".")
		none := base64.RawURLEncoding.EncodeToString([]byte(`{"typ":"JWT","alg":"none"}`))

		ctx := oidc.ClientContext(context.Background(), &http.Client{Transport: azure})
		const keys = "http://localhost/" + tenant + "/discovery/keys"
		service := newGuard(ctx, resource, tenant, azure.Issuer(), keys)
		otherIss := newGuard(ctx, resource, tenant, stranger.Issuer(), keys)
		otherTid := newGuard(ctx, resource, guestID, azure.Issuer(), keys)

		for _, tc := range []struct {
			name      string
			guard     *guard
			header    string
			want      int
			challenge string // its error code
		}{
			{"role", service, "Bearer " + good, 200, ""},
			{"role, scheme in lower case", service, "bearer " + good, 200, ""},
			{"no token", service, "", 401, ""},
			{"empty token", service, "Bearer ", 401, ""},
			{"other scheme", service, "Basic " + good, 401, ""},
			{"garbage", service, "Bearer garbage", 401, "invalid_token"},
			{"altered signature", service, "Bearer " + altered(good), 401, "invalid_token"},
			{"altered header", service, "Bearer " + none + "." + tail, 401, "invalid_token"},
			{"no signature", service, "Bearer " + none + "." + payload + ".", 401, "invalid_token"},
			{"two of three parts", service, "Bearer " + head + "." + payload, 401, "invalid_token"},
			{"expired", service, "Bearer " + expired, 401, "invalid_token"},
			{"other audience", service, "Bearer " + issue(t, azure, nil, elsewhere), 401, "invalid_token"},
			{"other tenant", service, "Bearer " + issue(t, stranger, nil, resource), 401, "invalid_token"},
			{"other issuer, same keys", otherIss, "Bearer " + good, 401, "invalid_token"},
			{"other tid, same keys", otherTid, "Bearer " + good, 401, "invalid_token"},
			{"no role", service, "Bearer " + issue(t, azure, guest, resource), 403, "insufficient_scope"},
		} {
			r := httptest.NewRequest(http.MethodGet, "/", nil)
			if tc.header != "" {
				r.Header.Set("Authorization", tc.header)
			}
			w := httptest.NewRecorder()
			tc.guard.require(role, greet).ServeHTTP(w, r)
			want := fmt.Sprintf("Bearer realm=%q", resource)
			switch {
			case tc.want == http.StatusOK:
				want = ""
			case tc.challenge != "":
				want += fmt.Sprintf(", error=%q", tc.challenge)
			}
			if w.Code != tc.want || w.Header().Get("WWW-Authenticate") != want {
				t.Errorf("%s: got %d, challenge %q, want %d, %q",
					tc.name, w.Code, w.Header().Get("WWW-Authenticate"), tc.want, want)
			}
		}
	})
}

func TestServiceTwoTokens(t *testing.T) {
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	r.Header["Authorization"] = []string{"Bearer one", "Bearer two"}
	if got := bearerToken(r); got != "" {
		t.Errorf("got %q of two Authorization headers, want none", got)
	}
}

// newTenant returns a tenant in memory with two services, a daemon that has the
// role in both, and a guest that has none.
func newTenant(t *testing.T, id string) *imdsfake.Handler {
	t.Helper()
	roles, err := imdsfake.ParseManifest(manifest)
	if err != nil {
		t.Fatal(err)
	}
	return &imdsfake.Handler{
		Tenant: id,
		Identities: []imdsfake.Identity{
			{Name: "daemon", ClientID: daemonID, SystemAssigned: true},
			{Name: "guest", ClientID: guestID},
		},
		Apps: []imdsfake.App{{URI: resource, Roles: roles}, {URI: elsewhere, Roles: roles}},
		Assignments: []imdsfake.Assignment{
			{Identity: "daemon", Resource: resource, Role: role},
			{Identity: "daemon", Resource: elsewhere, Role: role},
		},
	}
}

// issue returns a token of the tenant.
func issue(t *testing.T, azure *imdsfake.Handler, id azidentity.ManagedIDKind, aud string) string {
	t.Helper()
	cred := mitoken.Credential{ID: id, IMDSTransport: azure}
	defer cred.Close()
	tok, err := cred.TokenSource(aud).Token()
	if err != nil {
		t.Fatal(err)
	}
	return tok.AccessToken
}
