package imdsfake_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
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
	ctx := oidc.ClientContext(context.Background(), &http.Client{Transport: rt})
	ctx = oidc.InsecureIssuerURLContext(ctx, issuer) // Entra's v1 metadata is not at its issuer
	provider, err := oidc.NewProvider(ctx, "http://login.microsoftonline.com/"+imdsfake.DefaultTenant)
	if err != nil {
		t.Fatal(err)
	}
	tok, err := provider.Verifier(&oidc.Config{ClientID: audience, Now: time.Now}).Verify(ctx, token)
	if err != nil {
		t.Fatal(err)
	}
	var claims map[string]any
	if err := tok.Claims(&claims); err != nil {
		t.Fatal(err)
	}
	return claims
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
		{"elsewhere", plain, func(r *http.Request) { r.URL.Path = "/metadata/instance/nothing" }, 404, "not_found", "/metadata/instance/nothing"},
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

// azidentity, which knows nothing of this fake, gets tokens from it, at the
// address that it knows.
func TestAzidentity(t *testing.T) {
	fake := newTenant(t)
	fake.Apps = append(fake.Apps, imdsfake.App{URI: "api://1"}, imdsfake.App{URI: "api://2"}, imdsfake.App{URI: "api://3"})
	srv := imdsfake.NewServer(fake)
	defer srv.Close()
	for _, tc := range []struct {
		name     string
		id       azidentity.ManagedIDKind
		resource string // of its own, since MSAL's cache is that of the process
		oid      string
	}{
		{"default", nil, resource, ""},
		{"client ID", azidentity.ClientID("c0000000-0000-4000-8000-000000000001"), "api://1", "0b000000-0000-4000-8000-000000000001"},
		{"object ID", azidentity.ObjectID("0b000000-0000-4000-8000-000000000001"), "api://2", "0b000000-0000-4000-8000-000000000001"},
		{"resource ID", azidentity.ResourceID("/subscriptions/s/daemon"), "api://3", "0b000000-0000-4000-8000-000000000001"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cred, err := azidentity.NewManagedIdentityCredential(&azidentity.ManagedIdentityCredentialOptions{
				ClientOptions: azcore.ClientOptions{Transport: srv.Client()}, ID: tc.id,
			})
			if err != nil {
				t.Fatal(err)
			}
			tok, err := cred.GetToken(t.Context(), policy.TokenRequestOptions{Scopes: []string{tc.resource + "/.default"}})
			if err != nil {
				t.Fatal(err)
			}
			claims := verify(t, srv.Client().Transport, fake.Issuer(), tok.Token, tc.resource)
			if tc.oid != "" && claims["oid"] != tc.oid {
				t.Errorf("oid is %v, want %s", claims["oid"], tc.oid)
			}
			if left := time.Until(tok.ExpiresOn); left < 23*time.Hour {
				t.Errorf("the token expires in %v", left)
			}
		})
	}
	// And its error is that of IMDS.
	cred, err := azidentity.NewManagedIdentityCredential(&azidentity.ManagedIdentityCredentialOptions{
		ClientOptions: azcore.ClientOptions{Transport: srv.Client()}, ID: azidentity.ClientID("nobody"),
	})
	if err != nil {
		t.Fatal(err)
	}
	_, err = cred.GetToken(t.Context(), policy.TokenRequestOptions{Scopes: []string{resource}})
	if err == nil || !strings.Contains(err.Error(), "Identity not found") {
		t.Errorf("got %v", err)
	}
}

func TestKeepFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := &imdsfake.Handler{KeepFor: 12 * time.Hour}
		_, first := get(t, fake, plain)
		time.Sleep(12*time.Hour - 1)
		_, same := get(t, fake, plain)
		// expires_in counts from the issue, as Microsoft's document has it.
		if same["access_token"] != first["access_token"] || same["expires_in"] != "86400" {
			t.Error("12 h - 1 ns: another token")
		}
		if _, other := get(t, fake, "api-version=2018-02-01&resource=other"); other["access_token"] == first["access_token"] {
			t.Error("another resource got the same token")
		}
		time.Sleep(time.Nanosecond)
		if _, next := get(t, fake, plain); next["access_token"] == first["access_token"] {
			t.Error("12 h: the same token")
		}
	})
}

func TestKeptTokenExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := &imdsfake.Handler{Lifetime: time.Hour, KeepFor: 24 * time.Hour}
		_, first := get(t, fake, plain)
		time.Sleep(time.Hour)
		if _, next := get(t, fake, plain); next["access_token"] == first["access_token"] {
			t.Error("an expired token is given out")
		}
	})
}

func TestManyAtOnceGetOneToken(t *testing.T) {
	fake := &imdsfake.Handler{KeepFor: time.Hour}
	var mu sync.Mutex
	tokens := map[string]bool{}
	var wg sync.WaitGroup
	for range 200 {
		wg.Go(func() {
			_, a := get(t, fake, plain)
			mu.Lock()
			defer mu.Unlock()
			tokens[a["access_token"]] = true
		})
	}
	wg.Wait()
	if len(tokens) != 1 || len(fake.Requests()) != 200 {
		t.Errorf("%d tokens for %d requests, want 1 for 200", len(tokens), len(fake.Requests()))
	}
}

func TestAssign(t *testing.T) {
	fake := newTenant(t)
	roles := func() string {
		_, a := get(t, fake, plain)
		return fmt.Sprint(verify(t, fake, fake.Issuer(), a["access_token"], resource)["roles"])
	}
	if got := roles(); got != "<nil>" {
		t.Errorf("before: %s", got)
	}
	a := imdsfake.Assignment{Identity: "host", Resource: resource, Role: "consumer"}
	fake.Assign(a, a)
	if got := roles(); got != "[consumer]" {
		t.Errorf("after: %s", got)
	}
}

func TestMistakesPanic(t *testing.T) {
	for name, tc := range map[string]struct {
		fake *imdsfake.Handler
		a    imdsfake.Assignment
		want string
	}{
		"identity": {newTenant(t), imdsfake.Assignment{Identity: "x", Resource: resource, Role: "consumer"}, "no such identity"},
		"nobody":   {newTenant(t), imdsfake.Assignment{Resource: resource, Role: "consumer"}, "no such identity"},
		"app":      {newTenant(t), imdsfake.Assignment{Identity: "host", Resource: "x", Role: "consumer"}, "no such app"},
		"no apps":  {&imdsfake.Handler{}, imdsfake.Assignment{Identity: "host", Resource: resource, Role: "consumer"}, "no such app"},
		"role":     {newTenant(t), imdsfake.Assignment{Identity: "host", Resource: resource, Role: "admin"}, "declares no such role"},
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

// TestFaults is each fault in memory and on a port. A fault befalls one request:
// the next one succeeds.
func TestFaults(t *testing.T) {
	reset := func(err error) bool {
		return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, io.EOF)
	}
	for _, tc := range []struct {
		name   string
		fault  imdsfake.Fault
		status int              // of the answer
		body   string           // in it
		failed func(error) bool // or the error
		error  string           // in the journal
	}{
		{"status", imdsfake.Fault{Status: 503}, 503, `"error":"fault"`, nil, "fault"},
		{"body", imdsfake.Fault{Status: 200, Body: "<html>"}, 200, "<html>", nil, "fault"},
		{"Retry-After", imdsfake.Fault{Status: 429, RetryAfter: "7"}, 429, "", nil, "fault"},
		{"refuse", imdsfake.Fault{Failure: imdsfake.Refuse}, 0, "",
			func(err error) bool { return errors.Is(err, syscall.ECONNREFUSED) }, "refuse"},
		{"reset", imdsfake.Fault{Failure: imdsfake.Reset}, 0, "", reset, "reset"},
		{"truncate", imdsfake.Fault{Failure: imdsfake.Truncate}, 0, "",
			func(err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) }, "truncate"},
		{"truncated error", imdsfake.Fault{Failure: imdsfake.Truncate, Status: 500}, 0, "",
			func(err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) }, "truncate"},
		{"hang", imdsfake.Fault{Failure: imdsfake.Hang}, 0, "",
			func(err error) bool { return errors.Is(err, context.DeadlineExceeded) }, ""},
		{"latency", imdsfake.Fault{Latency: time.Millisecond}, 200, `"access_token"`, nil, ""},
	} {
		try := func(t *testing.T, fake *imdsfake.Handler, rt http.RoundTripper) {
			tc.fault.Times = 1
			fake.Inject(tc.fault)
			ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
			defer cancel()
			resp, err := rt.RoundTrip(newRequest(plain).WithContext(ctx))
			var body []byte
			if err == nil {
				body, err = io.ReadAll(resp.Body)
				resp.Body.Close()
			}
			switch {
			case tc.failed != nil:
				if err == nil || !tc.failed(err) {
					t.Errorf("got %v", err)
				}
			case err != nil:
				t.Error(err)
			case resp.StatusCode != tc.status || !strings.Contains(string(body), tc.body) ||
				resp.Header.Get("Retry-After") != tc.fault.RetryAfter || resp.ContentLength != int64(len(body)):
				t.Errorf("got %s, %d bytes: %s", resp.Status, resp.ContentLength, body)
			}
			if resp, _ := get(t, rt, plain); resp.StatusCode != 200 {
				t.Errorf("the next request got %s", resp.Status)
			}
		}
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := newTenant(t)
				try(t, fake, fake)
				if got := fake.Requests()[0]; tc.error != "" && (got.Error != tc.error || got.Resource != resource) {
					t.Errorf("the journal has %+v", got)
				}
			})
		})
		t.Run(tc.name+" on a port", func(t *testing.T) {
			srv := imdsfake.NewServer(newTenant(t))
			defer srv.Close()
			try(t, srv.Handler, srv.Client().Transport)
		})
	}
}

// A client that is not the Server's own finds a refused connection reset.
func TestRefuseOthers(t *testing.T) {
	srv := imdsfake.NewServer(nil)
	defer srv.Close()
	srv.Handler.Inject(imdsfake.Fault{Failure: imdsfake.Refuse})
	tr := &http.Transport{DisableKeepAlives: true}
	req := newRequest(plain)
	req.URL.Host = strings.TrimPrefix(srv.URL, "http://")
	if _, err := tr.RoundTrip(req); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, io.EOF) {
		t.Errorf("got %v", err)
	}
}

func TestFaultsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newTenant(t)
		status := func() int {
			resp, _ := get(t, fake, plain)
			return resp.StatusCode
		}
		fake.Inject(
			imdsfake.Fault{Status: 410, Times: 2},
			imdsfake.Fault{Status: 503, For: time.Hour},
			imdsfake.Fault{Status: 429},
		)
		var got []int
		for range 4 {
			got = append(got, status())
		}
		time.Sleep(time.Hour - 1)
		got = append(got, status())
		time.Sleep(time.Nanosecond)
		got = append(got, status())
		time.Sleep(1000 * time.Hour)
		got = append(got, status())
		fake.Clear()
		got = append(got, status())
		if want := []int{410, 410, 503, 503, 503, 429, 429, 200}; !slices.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
	})
}

func TestLatency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newTenant(t)
		fake.Inject(imdsfake.Fault{Latency: 3 * time.Second}, imdsfake.Fault{Failure: imdsfake.Refuse})
		begin := time.Now()
		get(t, fake, plain)
		if took := time.Since(begin); took != 3*time.Second {
			t.Errorf("took %v, want 3 s", took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := fake.RoundTrip(newRequest(plain).WithContext(ctx)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the deadline", err)
		}
		if took := time.Since(begin); took != 4*time.Second {
			t.Errorf("left after %v, want 4 s", took)
		}
	})
}

// Services read the keys while IMDS is down.
func TestKeysHaveNoFaults(t *testing.T) {
	fake := newTenant(t)
	_, a := get(t, fake, plain)
	fake.Inject(imdsfake.Fault{Failure: imdsfake.Refuse})
	verify(t, fake, fake.Issuer(), a["access_token"], resource)
}

func TestJournal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newTenant(t)
		begin := time.Now()
		req := newRequest(plain + "&object_id=0b000000-0000-4000-8000-000000000001")
		req.Header.Set("User-Agent", "test")
		resp, err := fake.RoundTrip(req)
		if err != nil || resp.StatusCode != 200 {
			t.Fatal(resp, err)
		}
		time.Sleep(time.Minute)
		get(t, fake, "api-version=2018-02-01")
		want := []imdsfake.Request{
			{Time: begin, Method: "GET", Path: "/metadata/identity/oauth2/token", Resource: resource,
				Identity: "object_id=0b000000-0000-4000-8000-000000000001", UserAgent: "test", Status: 200},
			{Time: begin.Add(time.Minute), Method: "GET", Path: "/metadata/identity/oauth2/token", Status: 400, Error: "invalid_request"},
		}
		got := fake.Requests()
		if !slices.Equal(got, want) {
			t.Errorf("got  %+v\nwant %+v", got, want)
		}
		body, _ := io.ReadAll(resp.Body)
		var a map[string]string
		_ = json.Unmarshal(body, &a)
		if strings.Contains(fmt.Sprintf("%+v", got), a["access_token"]) {
			t.Error("the journal has the token in it")
		}
	})
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

func TestServerHidesNothing(t *testing.T) {
	srv := imdsfake.NewServer(newTenant(t))
	defer srv.Close()
	for _, path := range []string{"/common/discovery/keys", "/" + imdsfake.DefaultTenant + "/discovery/keys"} {
		resp, err := srv.Client().Get(srv.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != 200 || !strings.Contains(string(text), `"kid"`) || strings.Contains(string(text), `"d"`) {
			t.Errorf("%s: %s %s", path, resp.Status, text)
		}
	}
	resp, err := srv.Client().Get("http://login.microsoftonline.com/" + imdsfake.DefaultTenant + "/.well-known/openid-configuration")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var meta map[string]any
	if err := json.NewDecoder(resp.Body).Decode(&meta); err != nil {
		t.Fatal(err)
	}
	if meta["issuer"] != srv.Handler.Issuer() || meta["jwks_uri"] != "http://login.microsoftonline.com/"+imdsfake.DefaultTenant+"/discovery/keys" {
		t.Errorf("the metadata is %v", meta)
	}
}

// Close does not wait for those that hang.
func TestCloseReleasesWhatHangs(t *testing.T) {
	srv := imdsfake.NewServer(nil)
	srv.Handler.Inject(imdsfake.Fault{Failure: imdsfake.Hang})
	sent, failed := make(chan bool, 1), make(chan error, 1)
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
		WroteRequest: func(httptrace.WroteRequestInfo) { sent <- true },
	})
	go func() {
		_, err := srv.Client().Do(newRequest(plain).WithContext(ctx))
		failed <- err
	}()
	<-sent
	srv.Close()
	if err := <-failed; err == nil {
		t.Error("there was an answer")
	}
}

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
