package mitoken

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"log/slog"
	"math/big"
	"net/http"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	azruntime "github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/aztoso/mitoken/imdsfake"
)

type tokenOptions = policy.TokenRequestOptions

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func certs(c *x509.Certificate) []*x509.Certificate { return []*x509.Certificate{c} }

// newCertificate is one that a service principal proves itself with.
func newCertificate(t *testing.T) (*x509.Certificate, crypto.PrivateKey) {
	t.Helper()
	key := must(rsa.GenerateKey(rand.Reader, 2048))
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "worker"},
		NotBefore: time.Unix(0, 0), NotAfter: time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC)}
	der := must(x509.CreateCertificate(rand.Reader, template, template, key.Public(), key))
	return must(x509.ParseCertificate(der)), key
}

// deaf is a credential that does not hear its context: it waits until it is let go,
// for one resource.
type deaf struct {
	upstream
	resource string
	release  chan struct{}
	calls    atomic.Int64
}

func (d *deaf) GetToken(_ context.Context, opts policy.TokenRequestOptions) (azcore.AccessToken, error) {
	if opts.Scopes[0] == d.resource+"/.default" {
		d.calls.Add(1)
		<-d.release
	}
	return d.upstream.GetToken(context.Background(), opts)
}

// A credential that is stuck holds up nobody: not its callers' contexts, not
// another resource, not Close. It is not asked again before it is over, and what it
// brings then is not lost.
func TestStuckCredential(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &deaf{resource: "stuck", release: make(chan struct{})}
		cred := &Credential{Upstream: up}
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		begin := time.Now()
		if _, err := cred.TokenSource("stuck").TokenContext(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) != 3*time.Second {
			t.Errorf("got %v after %v", err, time.Since(begin))
		}
		if _, err := cred.TokenSource("other").Token(); err != nil || time.Since(begin) != 3*time.Second {
			t.Errorf("another resource: %v after %v", err, time.Since(begin))
		}
		time.Sleep(10 * time.Minute)
		_, err := cred.TokenSource("stuck").Token()
		if err == nil || !strings.Contains(err.Error(), "no answer within 2m0s") {
			t.Errorf("later: %v", err)
		}
		if n := up.calls.Load(); n != 1 {
			t.Errorf("it was asked %d times, though it never answered", n)
		}
		close(up.release)
		time.Sleep(time.Minute) // an error is held for a moment
		if _, err := cred.TokenSource("stuck").Token(); err != nil || up.calls.Load() != 1 {
			t.Errorf("when it is over: %v, after %d calls", err, up.calls.Load())
		}
		cred.Close()
	})
}

func TestCloseDoesNotWaitForTheDeaf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &deaf{resource: "stuck", release: make(chan struct{})}
		cred := &Credential{Upstream: up}
		go cred.TokenSource("stuck").Token()
		synctest.Wait()
		begin := time.Now()
		cred.Close()
		if took := time.Since(begin); took > patience {
			t.Errorf("Close took %v", took)
		}
		close(up.release)
	})
}

// abrupt is a credential that panics, or ends its goroutine.
type abrupt struct{ panics bool }

func (a abrupt) GetToken(context.Context, policy.TokenRequestOptions) (azcore.AccessToken, error) {
	if !a.panics {
		runtime.Goexit()
	}
	var none *upstream
	none.calls = nil
	return azcore.AccessToken{}, nil
}

func TestAbruptCredential(t *testing.T) {
	for _, tc := range []struct {
		panics bool
		want   string
	}{{true, "invalid memory address"}, {false, "ended its goroutine"}} {
		synctest.Test(t, func(t *testing.T) {
			var log bytes.Buffer
			cred := &Credential{Upstream: abrupt{tc.panics}, Logger: slog.New(slog.NewTextHandler(&log, nil))}
			defer cred.Close()
			_, err := cred.TokenSource("r").Token()
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %s", err, tc.want)
			}
			synctest.Wait() // for the log
			if tc.panics && !strings.Contains(log.String(), "abrupt.GetToken") {
				t.Errorf("the log does not say where the panic was: %s", log.String())
			}
		})
	}
}

// A token is of one tenant. Who asks for another gets an error, not a token that a
// service refuses; who asks for that one, as clients of Key Vault do, gets it.
func TestTenant(t *testing.T) {
	fake := &imdsfake.Handler{}
	cred := &Credential{IMDSTransport: fake}
	defer cred.Close()
	for tenant, ok := range map[string]bool{"": true, imdsfake.DefaultTenant: true,
		strings.ToUpper(imdsfake.DefaultTenant): true, "22222222-2222-4333-8444-555555555555": false} {
		_, err := cred.GetToken(t.Context(), policy.TokenRequestOptions{Scopes: []string{"r/.default"}, TenantID: tenant})
		if (err == nil) != ok || err != nil && (!strings.Contains(err.Error(), tenant) || !strings.Contains(err.Error(), imdsfake.DefaultTenant)) {
			t.Errorf("%q: %v", tenant, err)
		}
	}
	// A token that is none of Entra's is anybody's.
	opaque := &Credential{Upstream: &upstream{}}
	defer opaque.Close()
	if _, err := opaque.GetToken(t.Context(), policy.TokenRequestOptions{Scopes: []string{"r/.default"}, TenantID: "t"}); err != nil {
		t.Error(err)
	}
	for _, token := range []string{"a.b", "a.!.c", "a.e30.c", "a.W10.c"} {
		if err := checkTenant(token, "t"); err != nil {
			t.Errorf("%s: %v", token, err)
		}
	}
}

// pipeline is that of a client of the Azure SDK, with azcore's policy over cred.
func pipeline(cred azcore.TokenCredential, service http.RoundTripper) azruntime.Pipeline {
	return azruntime.NewPipeline("test", "v1", azruntime.PipelineOptions{
		PerRetry: []policy.Policy{azruntime.NewBearerTokenPolicy(cred, []string{"api://x/.default"}, nil)},
	}, &policy.ClientOptions{Transport: &http.Client{Transport: service}, Retry: policy.RetryOptions{MaxRetries: -1}})
}

func send(t *testing.T, p azruntime.Pipeline) int {
	t.Helper()
	req := must(azruntime.NewRequest(t.Context(), http.MethodGet, "https://x.example/"))
	resp, err := p.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

// azcore's policy over a Credential never holds up a request while there is a
// valid token, be IMDS refusing or deaf.
func TestBearerPolicyNeverBlocks(t *testing.T) {
	service := roundTripper(func(req *http.Request) (*http.Response, error) { return respond(req, 200, ""), nil })
	for _, fault := range []imdsfake.Fault{{Failure: imdsfake.Hang}, {Failure: imdsfake.Refuse}, {Status: 503}} {
		synctest.Test(t, func(t *testing.T) {
			fake := &imdsfake.Handler{Cache: imdsfake.NoCache}
			cred := &Credential{IMDSTransport: fake}
			defer cred.Close()
			p := pipeline(cred, service)
			send(t, p)
			fake.Inject(fault)
			for range 23*60 + 55 {
				time.Sleep(time.Minute)
				begin := time.Now()
				if got := send(t, p); got != 200 || time.Since(begin) > 0 {
					t.Fatalf("%+v: got %d after %v", fault, got, time.Since(begin))
				}
			}
		})
	}
}

// A service that has had enough of any token, and says so in a claims challenge
// each time, costs IMDS a request in half a minute at most.
func TestChallengeStorm(t *testing.T) {
	challenge := `Bearer realm="", error="insufficient_claims", claims="eyJhY2Nlc3NfdG9rZW4iOnsibmJmIjp7ImVzc2VudGlhbCI6dHJ1ZSwidmFsdWUiOiIxNzI2MDc3NTk1In19fQ=="`
	service := roundTripper(func(req *http.Request) (*http.Response, error) {
		resp := respond(req, 401, "")
		resp.Header.Set("WWW-Authenticate", challenge)
		return resp, nil
	})
	synctest.Test(t, func(t *testing.T) {
		fake := &imdsfake.Handler{Cache: imdsfake.NoCache}
		cred := &Credential{IMDSTransport: fake}
		defer cred.Close()
		p := pipeline(cred, service)
		for range 10_000 {
			if got := send(t, p); got != 401 {
				t.Fatal(got)
			}
			time.Sleep(10 * time.Millisecond)
		}
		if n := len(fake.Requests()); n > 6 { // in 100 seconds
			t.Errorf("%d requests of IMDS", n)
		}
		if got := cred.TokenSource("api://x").Status(); got.State != "fresh" {
			t.Errorf("the status is %+v", got)
		}
	})
}
