package imdsfake_test

import (
	"context"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aztoso/mitoken/imdsfake"
	"github.com/coreos/go-oidc/v3/oidc"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const resource = "https://myapp.aztoso.com"

func consumer(t testing.TB) []imdsfake.AppRole {
	t.Helper()
	data, err := os.ReadFile("testdata/manifest.json")
	if err != nil {
		t.Fatal(err)
	}
	roles, err := imdsfake.ParseManifest(data)
	if err != nil {
		t.Fatal(err)
	}
	return roles
}

// newTenant is the tenant of the article: a host with its own identity and a
// user-assigned one, which has the role consumer at the service.
func newTenant(t testing.TB) *imdsfake.Handler {
	return &imdsfake.Handler{
		Identities: []imdsfake.Identity{
			{Name: "host", SystemAssigned: true},
			{Name: "daemon", ClientID: "c0000000-0000-4000-8000-000000000001",
				ObjectID: "0b000000-0000-4000-8000-000000000001", ResourceID: "/subscriptions/s/daemon"},
		},
		Apps:        []imdsfake.App{{URI: resource, ClientID: "a0000000-0000-4000-8000-000000000001", Roles: consumer(t)}},
		Assignments: []imdsfake.Assignment{{Identity: "daemon", Resource: resource, Role: "consumer"}},
	}
}

// get asks for a token as curl would, with whatever the query is.
func get(t testing.TB, rt http.RoundTripper, query string) (*http.Response, map[string]string) {
	t.Helper()
	resp, err := rt.RoundTrip(newRequest(query))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var fields map[string]string
	if err := json.NewDecoder(resp.Body).Decode(&fields); err != nil {
		t.Fatal(err)
	}
	return resp, fields
}

func newRequest(query string) *http.Request {
	req, err := http.NewRequest("GET", "http://169.254.169.254/metadata/identity/oauth2/token?"+query, nil)
	if err != nil {
		panic(err)
	}
	req.Header.Set("Metadata", "true")
	return req
}

const plain = "api-version=2018-02-01&resource=https%3A%2F%2Fmyapp.aztoso.com"

// verify checks a token as a service does, and returns its claims.
func verify(t testing.TB, rt http.RoundTripper, issuer, token, audience string) map[string]any {
	t.Helper()
	ctx, verifier := newVerifier(t, rt, issuer, audience)
	tok, err := verifier.Verify(ctx, token)
	if err != nil {
		t.Fatal(err)
	}
	var claims map[string]any
	if err := tok.Claims(&claims); err != nil {
		t.Fatal(err)
	}
	return claims
}

func tryVerify(t testing.TB, rt http.RoundTripper, issuer, token, audience string) error {
	t.Helper()
	ctx, verifier := newVerifier(t, rt, issuer, audience)
	_, err := verifier.Verify(ctx, token)
	return err
}

func newVerifier(t testing.TB, rt http.RoundTripper, issuer, audience string) (context.Context, *oidc.IDTokenVerifier) {
	t.Helper()
	ctx := oidc.ClientContext(context.Background(), &http.Client{Transport: rt})
	ctx = oidc.InsecureIssuerURLContext(ctx, issuer) // Entra's v1 metadata is not at its issuer
	provider, err := oidc.NewProvider(ctx, "http://login.microsoftonline.com/"+imdsfake.DefaultTenant)
	if err != nil {
		t.Fatal(err)
	}
	return ctx, provider.Verifier(&oidc.Config{ClientID: audience, Now: time.Now})
}

func TestToken(t *testing.T) {
	fake := newTenant(t)
	_, a := get(t, fake, plain+"&client_id=C0000000-0000-4000-8000-000000000001")
	claims := verify(t, fake, fake.Issuer(), a["access_token"], resource)
	want := map[string]any{
		"iss": "https://sts.windows.net/" + imdsfake.DefaultTenant + "/", "tid": imdsfake.DefaultTenant,
		"aud": resource, "appid": "c0000000-0000-4000-8000-000000000001", "appidacr": "2", "idtyp": "app",
		"oid": "0b000000-0000-4000-8000-000000000001", "sub": "0b000000-0000-4000-8000-000000000001",
		"ver": "1.0", "xms_mirid": "/subscriptions/s/daemon",
	}
	for name, v := range want {
		if claims[name] != v {
			t.Errorf("%s is %v, want %v", name, claims[name], v)
		}
	}
	if got := fmt.Sprint(claims["roles"]); got != "[consumer]" {
		t.Errorf("roles is %s", got)
	}
	if claims["exp"].(float64)-claims["iat"].(float64) != 86400 || claims["nbf"] != claims["iat"] {
		t.Errorf("the times are %v, %v, %v", claims["iat"], claims["nbf"], claims["exp"])
	}
	if a["token_type"] != "Bearer" || a["resource"] != resource || a["expires_in"] != "86400" ||
		a["client_id"] != want["appid"] || a["expires_on"] != fmt.Sprintf("%.0f", claims["exp"]) ||
		a["not_before"] != fmt.Sprintf("%.0f", claims["nbf"]) {
		a["access_token"] = "..."
		t.Errorf("the answer is %v", a)
	}
	// The host's own identity has no role, and no roles claim.
	_, a = get(t, fake, plain)
	if roles, ok := verify(t, fake, fake.Issuer(), a["access_token"], resource)["roles"]; ok {
		t.Errorf("roles is %v, want none", roles)
	}
}

func TestIdentities(t *testing.T) {
	two := []imdsfake.Identity{{Name: "a"}, {Name: "b"}}
	daemon := "c0000000-0000-4000-8000-000000000001"
	for _, tc := range []struct {
		name       string
		identities []imdsfake.Identity // those of newTenant if nil
		selector   string
		clientID   string // or the error
		want       string
	}{
		{"client ID", nil, "client_id=c0000000-0000-4000-8000-000000000001", daemon, ""},
		{"object ID", nil, "object_id=0b000000-0000-4000-8000-000000000001", daemon, ""},
		{"principal ID", nil, "principal_id=0B000000-0000-4000-8000-000000000001", daemon, ""},
		{"resource ID", nil, "msi_res_id=/subscriptions/s/daemon", daemon, ""},
		{"resource ID, the other name", nil, "mi_res_id=/SUBSCRIPTIONS/S/daemon", daemon, ""},
		{"the only one", []imdsfake.Identity{{ClientID: "one"}}, "", "one", ""},
		{"unknown", nil, "client_id=nobody", "", "Identity not found"},
		{"an object ID is no client ID", nil, "client_id=0b000000-0000-4000-8000-000000000001", "", "Identity not found"},
		{"none on this host", []imdsfake.Identity{}, "", "", "Identity not found"},
		{"one of two", two, "", "", "Multiple user assigned identities exist"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fake := newTenant(t)
			if tc.identities != nil {
				fake.Identities, fake.Assignments = tc.identities, nil
			}
			query := plain
			if tc.selector != "" {
				query += "&" + tc.selector
			}
			resp, a := get(t, fake, query)
			if tc.want == "" {
				if a["client_id"] != tc.clientID {
					t.Errorf("got %s %s, want %s", a["client_id"], a["error_description"], tc.clientID)
				}
			} else if resp.StatusCode != 400 || a["error"] != "invalid_request" || !strings.Contains(a["error_description"], tc.want) {
				t.Errorf("got %d %v, want %q", resp.StatusCode, a, tc.want)
			}
		})
	}
}

// TestRefusals sends what IMDS does not take.
func TestRefusals(t *testing.T) {
	for _, tc := range []struct {
		name   string
		query  string
		change func(*http.Request)
		status int
		code   string
		text   string
	}{
		{"no Metadata header", plain, func(r *http.Request) { r.Header.Del("Metadata") },
			400, "bad_request_102", "Required metadata header not specified"},
		{"Metadata: True", plain, func(r *http.Request) { r.Header.Set("Metadata", "True") },
			400, "bad_request_102", "Required metadata header not specified"},
		{"through a proxy", plain, func(r *http.Request) { r.Header.Set("X-Forwarded-For", "10.0.0.1") },
			400, "invalid_request", "X-Forwarded-For"},
		{"POST", plain, func(r *http.Request) { r.Method = "POST" }, 405, "method_not_allowed", "GET"},
		{"elsewhere", plain, func(r *http.Request) { r.URL.Path = "/metadata/identity" + r.URL.Path }, 401, "unknown_source", "Unknown Source http://169.254.169.254/metadata/identity/metadata"},
		{"no api-version", "resource=x", nil, 400, "invalid_request", `"api-version" is missing`},
		{"old api-version", "api-version=2017-01-01&resource=x", nil, 400, "invalid_request", "2018-02-01"},
		{"no resource", "api-version=2018-02-01", nil, 400, "invalid_request", `"resource" is missing`},
		{"empty resource", "api-version=2018-02-01&resource=", nil, 400, "invalid_request", `"resource" is missing`},
		{"two resources", plain + "&resource=x", nil, 400, "invalid_request", "more than once"},
		{"two selectors", plain + "&client_id=a&object_id=b", nil, 400, "invalid_request", "Only one of client_id, object_id"},
		{"empty selector", plain + "&client_id=", nil, 400, "invalid_request", `"client_id" is empty`},
		{"misspelled selector", plain + "&clientid=a", nil, 400, "invalid_request", `"clientid" is not known`},
		{"malformed query", plain + "&a;b", nil, 400, "invalid_request", "malformed"},
		{"unknown resource", "api-version=2018-02-01&resource=https%3A%2F%2Fother", nil, 400, "invalid_resource", "AADSTS500011: The resource principal named https://other"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fake := newTenant(t)
			req := newRequest(tc.query)
			if tc.change != nil {
				tc.change(req)
			}
			resp, err := fake.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			var a map[string]string
			if err := json.NewDecoder(resp.Body).Decode(&a); err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode != tc.status || a["error"] != tc.code || !strings.Contains(a["error_description"], tc.text) {
				t.Errorf("got %s %v, want %d %s %q", resp.Status, a, tc.status, tc.code, tc.text)
			}
			if got := resp.Header.Get("Content-Type"); got != "application/json; charset=utf-8" {
				t.Errorf("Content-Type is %q", got)
			}
		})
	}
}

func TestResourceMayBeTheClientID(t *testing.T) {
	for asked, known := range map[string]bool{
		resource: true, resource + "/": true, "A0000000-0000-4000-8000-000000000001": true, resource + "/x": false,
	} {
		resp, a := get(t, newTenant(t), "api-version=2018-02-01&resource="+url.QueryEscape(asked))
		if (resp.StatusCode == 200) != known || known && a["resource"] != asked {
			t.Errorf("%s: got %s for %q", asked, resp.Status, a["resource"])
		}
	}
}

func TestMistakesPanic(t *testing.T) {
	for name, tc := range map[string]struct {
		fake *imdsfake.Handler
		a    imdsfake.Assignment
		want string
	}{
		"identity": {newTenant(t), imdsfake.Assignment{Identity: "x", Resource: resource, Role: "consumer"}, `no identity "x"`},
		"nobody":   {newTenant(t), imdsfake.Assignment{Resource: resource, Role: "consumer"}, `no identity ""`},
		"app":      {newTenant(t), imdsfake.Assignment{Identity: "host", Resource: "x", Role: "consumer"}, `no app "x"`},
		"no apps":  {&imdsfake.Handler{}, imdsfake.Assignment{Identity: "host", Resource: resource, Role: "consumer"}, "no app"},
		"role":     {newTenant(t), imdsfake.Assignment{Identity: "host", Resource: resource, Role: "admin"}, `declares no app role "admin"`},
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if p := fmt.Sprint(recover()); !strings.Contains(p, tc.want) {
					t.Errorf("panic %q, want %q", p, tc.want)
				}
			}()
			tc.fake.Assign(tc.a)
		})
	}
}

// Check says where the mistake is, and whoever does not ask it finds out.
func TestCheck(t *testing.T) {
	roles := func(r ...imdsfake.AppRole) []imdsfake.App {
		return []imdsfake.App{{URI: "api://a", Roles: r}}
	}
	user := imdsfake.AppRole{Value: "a", AllowedMemberTypes: []string{"User"}, IsEnabled: true}
	off := imdsfake.AppRole{Value: "a", AllowedMemberTypes: []string{"Application"}}
	two := func(a, b imdsfake.Identity) []imdsfake.Identity { return []imdsfake.Identity{a, b} }
	host := imdsfake.Assignment{Identity: "host", Resource: "api://a", Role: "a"}
	for want, fake := range map[string]*imdsfake.Handler{
		`tenant: "contoso" is not a GUID`:           {Tenant: "contoso"},
		`lifetime: 1ms is less than a second`:       {Lifetime: time.Millisecond},
		`cache: "sometimes" is none of`:             {Cache: "sometimes"},
		`limits: {PerSecond:-1 AtOnce:0}`:           {Limits: imdsfake.Limits{PerSecond: -1}},
		`identities[1]: "b" is system-assigned`:     {Identities: two(imdsfake.Identity{Name: "a", SystemAssigned: true}, imdsfake.Identity{Name: "b", SystemAssigned: true})},
		`identities[1]: the name "A" is that of`:    {Identities: two(imdsfake.Identity{Name: "a"}, imdsfake.Identity{Name: "A", SystemAssigned: true})},
		`identities[1]: clientId: X is that of "a"`: {Identities: two(imdsfake.Identity{Name: "a", ClientID: "x"}, imdsfake.Identity{Name: "b", ClientID: "X"})},
		`identities[1]: objectId: X is that of "a"`: {Identities: two(imdsfake.Identity{Name: "a", ObjectID: "x"}, imdsfake.Identity{Name: "b", ObjectID: "X"})},
		`apps[0]: uri: it is empty`:                 {Apps: []imdsfake.App{{}}},
		`apps[1]: uri: api://a/ is that of another`: {Apps: []imdsfake.App{{URI: "api://a"}, {URI: "api://a/"}}},
		`apps[1]: clientId: C is that of api://a`:   {Apps: []imdsfake.App{{URI: "api://a", ClientID: "c"}, {URI: "api://b", ClientID: "C"}}},
		`apps[1]: objectId: O is that of api://a`:   {Apps: []imdsfake.App{{URI: "api://a", ObjectID: "o"}, {URI: "api://b", ObjectID: "O"}}},
		`identities[1]: resourceId: /X is that of`:  {Identities: two(imdsfake.Identity{Name: "a", ResourceID: "/x"}, imdsfake.Identity{Name: "b", ResourceID: "/X"})},
		`apps[0]: roles[1]: id I is that of`:        {Apps: roles(imdsfake.AppRole{ID: "i", Value: "a", AllowedMemberTypes: []string{"User"}}, imdsfake.AppRole{ID: "I", Value: "b", AllowedMemberTypes: []string{"User"}})},
		`servicePrincipals[0]: clientId: C is that`: {Identities: []imdsfake.Identity{{ClientID: "c"}}, ServicePrincipals: []imdsfake.ServicePrincipal{{Name: "w", ClientID: "C"}}},
		`apps[0]: tokenVersion: 3 is neither`:       {Apps: []imdsfake.App{{URI: "api://a", TokenVersion: 3}}},
		`apps[0]: lifetime: 1ns is less than`:       {Apps: []imdsfake.App{{URI: "api://a", Lifetime: 1}}},
		`apps[0]: roles[0]: value is empty`:         {Apps: roles(imdsfake.AppRole{})},
		`assignments[0]: identity: there is no`:     {Assignments: []imdsfake.Assignment{{}}},
		`assignments[0]: resource: there is no`:     {Assignments: []imdsfake.Assignment{host}},
		`assignments[0]: role: "a" is for users`:    {Apps: roles(user), Assignments: []imdsfake.Assignment{host}},
		`assignments[0]: role: "a" is for users o`:  {Apps: roles(off), Assignments: []imdsfake.Assignment{host}},
	} {
		t.Run(want, func(t *testing.T) {
			if err := fake.Check(); err == nil || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("got %v", err)
			}
			defer func() {
				if p := fmt.Sprint(recover()); !strings.HasPrefix(p, "imdsfake: "+want) {
					t.Errorf("panic %q", p)
				}
			}()
			_, _ = fake.RoundTrip(newRequest(plain))
		})
	}
	if err := new(imdsfake.Handler).Check(); err != nil {
		t.Error(err)
	}
}

// Each app may have a lifetime of its own.
func TestLifetimes(t *testing.T) {
	fake := &imdsfake.Handler{Lifetime: 2 * time.Hour, Apps: []imdsfake.App{{URI: "api://long"}, {URI: "api://short", Lifetime: time.Minute}}}
	for resource, want := range map[string]string{"api://long": "7200", "api://short": "60"} {
		if _, a := get(t, fake, "api-version=2018-02-01&resource="+resource); a["expires_in"] != want {
			t.Errorf("%s: %s, want %s", resource, a["expires_in"], want)
		}
	}
}

// An app can ask for tokens of version 2, which any validator takes at their
// issuer's own address.
func TestV2(t *testing.T) {
	fake := newTenant(t)
	fake.Apps[0].TokenVersion = 2
	_, a := get(t, fake, plain+"&client_id="+daemonClientID)
	ctx := oidc.ClientContext(t.Context(), &http.Client{Transport: fake})
	issuer := "https://login.microsoftonline.com/" + imdsfake.DefaultTenant + "/v2.0"
	provider, err := oidc.NewProvider(ctx, issuer)
	if err != nil {
		t.Fatal(err)
	}
	tok, err := provider.Verifier(&oidc.Config{ClientID: fake.Apps[0].ClientID}).Verify(ctx, a["access_token"])
	if err != nil {
		t.Fatal(err)
	}
	var claims map[string]any
	if err := tok.Claims(&claims); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]any{"ver": "2.0", "azp": daemonClientID, "azpacr": "2", "appid": nil, "appidacr": nil,
		"idp": nil, "oid": daemonObjectID, "roles": []any{"consumer"}} {
		if fmt.Sprint(claims[name]) != fmt.Sprint(want) {
			t.Errorf("%s is %v, want %v", name, claims[name], want)
		}
	}
}

// After a rotation, tokens of the key before can be verified, those of the one
// before that cannot.
func TestRotateKey(t *testing.T) {
	fake := newTenant(t)
	fake.Cache = imdsfake.NoCache
	stranger := newTenant(t)
	kid := func(token string) string {
		head, _, _ := strings.Cut(token, ".")
		text, _ := base64.RawURLEncoding.DecodeString(head)
		var h struct{ Kid, X5t, Alg string }
		if err := json.Unmarshal(text, &h); err != nil || h.Kid != h.X5t || h.Kid == "" || h.Alg != "RS256" {
			t.Fatalf("the header is %s", text)
		}
		return h.Kid
	}
	var tokens []string
	for range 3 {
		_, a := get(t, fake, plain)
		tokens = append(tokens, a["access_token"])
		fake.RotateKey()
	}
	if kid(tokens[0]) == kid(tokens[1]) || kid(tokens[1]) == kid(tokens[2]) {
		t.Error("two have one key")
	}
	verify(t, fake, fake.Issuer(), tokens[2], resource)
	if err := tryVerify(t, fake, fake.Issuer(), tokens[1], resource); err == nil {
		t.Error("the key before the last one is published")
	}
	_, a := get(t, stranger, plain)
	if kid(a["access_token"]) != kid(tokens[0]) {
		t.Error("another Handler has another key")
	}
}

// Rotations at the same time lose no key: of the two that are published, both sign
// or have signed.
func TestRotateKeyAtOnce(t *testing.T) {
	fake := newTenant(t)
	_, a := get(t, fake, plain)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(fake.RotateKey)
	}
	wg.Wait()
	if err := tryVerify(t, fake, fake.Issuer(), a["access_token"], resource); err == nil {
		t.Error("the key before the last one is published")
	}
}

// The certificates of the keys are what their thumbprints say.
func TestKeysHaveCertificates(t *testing.T) {
	fake := newTenant(t)
	resp, err := fake.RoundTrip(newRequestTo("GET", "https://login.microsoftonline.com/common/discovery/v2.0/keys"))
	if err != nil {
		t.Fatal(err)
	}
	var set struct {
		Keys []struct {
			Kid, X5t, N, Issuer string
			X5c                 []string
		}
	}
	if err := json.NewDecoder(resp.Body).Decode(&set); err != nil || len(set.Keys) != 1 {
		t.Fatal(err, set)
	}
	k := set.Keys[0]
	der, _ := base64.StdEncoding.DecodeString(k.X5c[0])
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha1.Sum(der)
	n := cert.PublicKey.(*rsa.PublicKey).N.Bytes()
	if k.X5t != base64.RawURLEncoding.EncodeToString(sum[:]) || k.N != base64.RawURLEncoding.EncodeToString(n) ||
		!strings.HasSuffix(k.Issuer, "/v2.0") {
		t.Errorf("the key is %+v", k)
	}
}

// Services read the keys while IMDS is down.
func TestKeysHaveNoFaults(t *testing.T) {
	fake := newTenant(t)
	_, a := get(t, fake, plain)
	fake.Inject(imdsfake.Fault{Failure: imdsfake.Refuse})
	verify(t, fake, fake.Issuer(), a["access_token"], resource)
}

// In memory it is as polite as a transport: the body is closed, the trace told,
// and the request not touched.
func TestRoundTripManners(t *testing.T) {
	fake := newTenant(t)
	connections := 0
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { connections++ },
	})
	try := func() (*http.Response, *body, error) {
		b := &body{}
		req := newRequest(plain).WithContext(ctx)
		req.Body = b
		resp, err := fake.RoundTrip(req)
		if resp != nil && resp.Request != req {
			t.Error("the response is of another request")
		}
		return resp, b, err
	}
	resp, b, err := try()
	if err != nil || b.closed != 1 || connections != 1 || resp.Status != "200 OK" || resp.Proto != "HTTP/1.1" {
		t.Errorf("got %v, %v, %d closed, %d connections", resp, err, b.closed, connections)
	}
	fake.Inject(imdsfake.Fault{Failure: imdsfake.Refuse})
	if _, b, err := try(); err == nil || b.closed != 1 || connections != 1 {
		t.Errorf("refused: %v, %d closed, %d connections", err, b.closed, connections)
	}
}

type body struct{ closed int }

func (*body) Read([]byte) (int, error) { return 0, io.EOF }
func (b *body) Close() error           { b.closed++; return nil }

func TestRecorder(t *testing.T) {
	fake := newTenant(t)
	w := httptest.NewRecorder()
	fake.ServeHTTP(w, newRequest(plain))
	if w.Code != 200 {
		t.Errorf("got %d", w.Code)
	}
	fake.Inject(imdsfake.Fault{Failure: imdsfake.Reset})
	defer func() {
		if p := recover(); p != http.ErrAbortHandler {
			t.Errorf("panic %v, want http.ErrAbortHandler", p)
		}
	}()
	fake.ServeHTTP(httptest.NewRecorder(), newRequest(plain))
}
