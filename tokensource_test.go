package mitoken_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	azruntime "github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/aztoso/mitoken"
	"github.com/aztoso/mitoken/imdsfake"
	"github.com/coreos/go-oidc/v3/oidc"
	"go.uber.org/goleak"
	"golang.org/x/oauth2"
)

// The main story of the package, told from outside: with the fake metadata
// service, and what users put around a Credential. The rooms have tests of their
// own.

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	resource = "https://myapp.aztoso.com"
	day      = 24 * time.Hour
)

// newFake returns a metadata service whose host has an identity with the role
// consumer, and a user-assigned one without.
func newFake() *imdsfake.Handler {
	return &imdsfake.Handler{
		Identities: []imdsfake.Identity{
			{Name: "host", SystemAssigned: true},
			{Name: "other", ClientID: "c1", ObjectID: "o1", ResourceID: "/subscriptions/s/other"},
		},
		Apps: []imdsfake.App{{
			URI:   resource,
			Roles: []imdsfake.AppRole{{Value: "consumer", AllowedMemberTypes: []string{"Application"}, IsEnabled: true}},
		}},
		Assignments: []imdsfake.Assignment{{Identity: "host", Resource: resource, Role: "consumer"}},
		Cache:       imdsfake.NoCache,
	}
}

// verify checks a token as the service does, and returns its claims.
func verify(t *testing.T, fake *imdsfake.Handler, token string) (claims struct {
	OID   string   `json:"oid"`
	Roles []string `json:"roles"`
}) {
	t.Helper()
	ctx := oidc.ClientContext(context.Background(), &http.Client{Transport: fake})
	keys := oidc.NewRemoteKeySet(ctx, "https://login.microsoftonline.com/common/discovery/keys")
	tok, err := oidc.NewVerifier(fake.Issuer(), keys, &oidc.Config{ClientID: resource}).Verify(ctx, token)
	if err == nil {
		err = tok.Claims(&claims)
	}
	if err != nil {
		t.Fatal(err)
	}
	return claims
}

func TestTokenIsWhoseItIsToBe(t *testing.T) {
	for name, id := range map[string]azidentity.ManagedIDKind{
		"default":     nil,
		"client ID":   azidentity.ClientID("c1"),
		"object ID":   azidentity.ObjectID("o1"),
		"resource ID": azidentity.ResourceID("/subscriptions/s/other"),
	} {
		t.Run(name, func(t *testing.T) {
			fake := newFake()
			cred := &mitoken.Credential{ID: id, IMDSTransport: fake}
			defer cred.Close()
			tok, err := cred.TokenSource(resource).Token()
			if err != nil {
				t.Fatal(err)
			}
			claims := verify(t, fake, tok.AccessToken)
			if id == nil && fmt.Sprint(claims.Roles) != "[consumer]" || id != nil && (claims.OID != "o1" || claims.Roles != nil) {
				t.Errorf("the claims are %+v", claims)
			}
			if tok.TokenType != "Bearer" || time.Until(tok.Expiry) < 23*time.Hour {
				t.Errorf("the token is a %s, and expires at %v", tok.TokenType, tok.Expiry)
			}
		})
	}
}

// A year in the life of a daemon that makes a call a minute.
func TestYear(t *testing.T) {
	for name, cache := range map[string]imdsfake.Cache{
		"IMDS mints a token for each request":  imdsfake.NoCache,
		"IMDS keeps a token for half its life": imdsfake.UntilHalfLife,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := newFake()
				fake.Cache = cache
				cred := &mitoken.Credential{IMDSTransport: fake}
				defer cred.Close()
				src := cred.TokenSource(resource)
				least := day
				for range 365 * 24 * 60 {
					begin := time.Now()
					tok, err := src.Token()
					if err != nil || time.Since(begin) > 0 {
						t.Fatalf("after %v: %v", time.Since(begin), err)
					}
					least = min(least, time.Until(tok.Expiry))
					time.Sleep(time.Minute)
				}
				if least < day/2 {
					t.Errorf("once there were only %v left, want half a day always", least)
				}
				// A refresh every 9.6 to 12 hours; where IMDS keeps tokens, with a
				// probe every quarter of an hour or so until it has a newer one.
				n, most := len(fake.Requests()), 365*25/10
				if cache == imdsfake.UntilHalfLife {
					most = 365 * 2 * 14
				}
				if n < 365*2 || n > most {
					t.Errorf("%d requests in a year, want %d to %d", n, 365*2, most)
				}
			})
		})
	}
}

// Whatever befalls IMDS, the first token waits it out, and a refresh is not felt.
func TestFaults(t *testing.T) {
	for _, fault := range []imdsfake.Fault{
		{Status: 404}, {Status: 410}, {Status: 429, RetryAfter: "3"}, {Status: 500}, {Status: 503, Body: "<html>"},
		{Failure: imdsfake.Refuse}, {Failure: imdsfake.Reset}, {Failure: imdsfake.Truncate}, {Failure: imdsfake.Hang},
		{Latency: 9 * time.Second}, {Latency: time.Minute},
	} {
		t.Run(fmt.Sprintf("%d %s %v", fault.Status, fault.Failure, fault.Latency), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := newFake()
				cred := &mitoken.Credential{IMDSTransport: fake}
				defer cred.Close()
				src := cred.TokenSource(resource)
				fault.Times = 2
				fake.Inject(fault)
				first, err := src.Token()
				if err != nil {
					t.Fatal(err)
				}
				fault.Times, fault.For = 0, 20*time.Hour
				fake.Inject(fault)
				for range 20 * 60 {
					time.Sleep(time.Minute)
					begin := time.Now()
					if _, err := src.Token(); err != nil || time.Since(begin) > 0 {
						t.Fatalf("a caller got %v after %v", err, time.Since(begin))
					}
				}
				time.Sleep(30 * time.Minute)
				if tok, err := src.Token(); err != nil || tok.AccessToken == first.AccessToken {
					t.Errorf("half an hour after the fault there is no new token: %v", err)
				}
			})
		})
	}
}

// 10,000 callers on an empty cache are one request, in memory and on a port.
func TestStampede(t *testing.T) {
	srv := imdsfake.NewServer(newFake())
	defer srv.Close()
	for name, cred := range map[string]*mitoken.Credential{
		"default endpoint": {IMDSTransport: srv.Client().Transport},
		"own endpoint":     {Endpoint: srv.URL},
		"in memory":        {IMDSTransport: srv.Handler},
	} {
		t.Run(name, func(t *testing.T) {
			defer cred.Close()
			before := len(srv.Handler.Requests())
			srv.Handler.Inject(imdsfake.Fault{Latency: 50 * time.Millisecond, Times: 1})
			var wg sync.WaitGroup
			start := make(chan bool)
			for range 10_000 {
				wg.Go(func() {
					<-start
					if _, err := cred.TokenSource(resource).Token(); err != nil {
						t.Error(err)
					}
				})
			}
			close(start)
			wg.Wait()
			if n := len(srv.Handler.Requests()) - before; n != 1 {
				t.Errorf("%d requests, want 1", n)
			}
		})
	}
}

// A source at rest has a timer, and no goroutine or connection.
func TestNothingRunsAtRest(t *testing.T) {
	srv := imdsfake.NewServer(nil)
	defer srv.Close()
	before := goleak.IgnoreCurrent()
	cred := &mitoken.Credential{Endpoint: srv.URL}
	defer cred.Close()
	for _, resource := range []string{"a", "b", "c"} {
		if _, err := cred.TokenSource(resource).Token(); err != nil {
			t.Fatal(err)
		}
	}
	goleak.VerifyNone(t, before)
}

func TestErrorsAreForTheReader(t *testing.T) {
	fake := newFake()
	cred := &mitoken.Credential{ID: azidentity.ClientID("nobody"), IMDSTransport: fake}
	defer cred.Close()
	_, err := cred.TokenSource(resource).Token()
	refusal, ok := errors.AsType[*mitoken.ResponseError](err)
	if !ok || refusal.StatusCode != 400 || refusal.Code != "invalid_request" || refusal.Description != "Identity not found" {
		t.Errorf("got %v", err)
	}
	_, err = cred.TokenSource("https://unknown").Token()
	if err == nil || !strings.Contains(err.Error(), "Identity not found") {
		t.Errorf("got %v", err)
	}
	other := &mitoken.Credential{IMDSTransport: fake}
	defer other.Close()
	if _, err = other.TokenSource("https://unknown").Token(); err == nil || !strings.Contains(err.Error(), "AADSTS500011") {
		t.Errorf("got %v", err)
	}
	if _, err := new(mitoken.TokenSource).Token(); err == nil || !strings.Contains(err.Error(), "Credential.TokenSource") {
		t.Errorf("got %v", err)
	}
}

func TestClosedCredential(t *testing.T) {
	cred := &mitoken.Credential{IMDSTransport: newFake()}
	used := cred.TokenSource(resource)
	if _, err := used.Token(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := cred.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, src := range []*mitoken.TokenSource{used, cred.TokenSource(resource), cred.TokenSource("new")} {
		if _, err := src.Token(); !errors.Is(err, mitoken.ErrClosed) {
			t.Errorf("got %v, want ErrClosed", err)
		}
		if got := src.Status().State; got != "closed" {
			t.Errorf("the state is %s", got)
		}
	}
	var unused mitoken.Credential
	unused.Close()
	if _, err := unused.TokenSource(resource).Token(); !errors.Is(err, mitoken.ErrClosed) {
		t.Errorf("got %v, want ErrClosed", err)
	}
}

func TestGetToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newFake()
		cred := &mitoken.Credential{IMDSTransport: fake}
		defer cred.Close()
		ctx := t.Context()
		for _, scope := range []string{resource + "/.default", resource} {
			tok, err := cred.GetToken(ctx, policy.TokenRequestOptions{Scopes: []string{scope}})
			if err != nil {
				t.Fatal(err)
			}
			left, refresh := time.Until(tok.ExpiresOn), time.Until(tok.RefreshOn)
			if tok.Token == "" || left != day || refresh < day*4/10 || refresh > day/2 {
				t.Errorf("%s: expires in %v, to be refreshed in %v", scope, left, refresh)
			}
		}
		if n := len(fake.Requests()); n != 1 {
			t.Errorf("%d requests, want 1", n)
		}
		for want, opts := range map[string]policy.TokenRequestOptions{
			"one scope, not 0":  {},
			"one scope, not 2":  {Scopes: []string{"a", "b"}},
			"resource is empty": {Scopes: []string{"/.default"}},
			"AADSTS500011":      {Scopes: []string{"https://unknown/.default"}},
		} {
			if tok, err := cred.GetToken(ctx, opts); err == nil || !strings.Contains(err.Error(), want) || tok != (azcore.AccessToken{}) {
				t.Errorf("%+v: got %v, want %q", opts, err, want)
			}
		}
		// Key Vault's clients name the tenant each time.
		opts := policy.TokenRequestOptions{Scopes: []string{resource}, TenantID: imdsfake.DefaultTenant}
		if _, err := cred.GetToken(ctx, opts); err != nil {
			t.Error(err)
		}
		opts = policy.TokenRequestOptions{Scopes: []string{resource}, Claims: `{"access_token":{}}`}
		if _, err := cred.GetToken(ctx, opts); err != nil {
			t.Error(err)
		}
	})
}

// The pipeline of the Azure SDK, with a Credential in place of azidentity's.
func TestAzureSDK(t *testing.T) {
	fake := newFake()
	cred := &mitoken.Credential{IMDSTransport: fake}
	defer cred.Close()
	service := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if roles := verify(t, fake, token).Roles; len(roles) != 1 {
			w.WriteHeader(http.StatusForbidden)
		}
	}))
	defer service.Close()
	pipeline := azruntime.NewPipeline("test", "v1", azruntime.PipelineOptions{
		PerRetry: []policy.Policy{azruntime.NewBearerTokenPolicy(cred, []string{resource + "/.default"}, nil)},
	}, &policy.ClientOptions{Transport: service.Client()})
	for range 10 {
		req, err := azruntime.NewRequest(t.Context(), http.MethodGet, service.URL)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := pipeline.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			t.Errorf("got %s", resp.Status)
		}
	}
	if n := len(fake.Requests()); n != 1+10 { // and those for the keys
		t.Errorf("%d requests, want 1", n)
	}
}

// What the documentation of TokenSource warns of.
func TestReuseTokenSourceDisarmsTheRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cred := &mitoken.Credential{IMDSTransport: newFake()}
		defer cred.Close()
		src := cred.TokenSource(resource)
		first, err := src.Token()
		if err != nil {
			t.Fatal(err)
		}
		reuse := oauth2.ReuseTokenSource(nil, src)
		for range 23*60 + 59 {
			time.Sleep(time.Minute)
			if tok, err := reuse.Token(); err != nil || tok.AccessToken != first.AccessToken {
				t.Fatalf("oauth2 has learnt, and lets go of a token: say so in the docs: %v", err)
			}
		}
		if tok, _ := src.Token(); tok.AccessToken == first.AccessToken {
			t.Error("the source itself has not let go of it")
		}
	})
}
