package mitoken

import (
	"context"
	"errors"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
)

// upstream is a credential of another maker, with a cache of its own that only
// claims get past, as azidentity's have.
type upstream struct {
	err error

	mu     sync.Mutex
	calls  []policy.TokenRequestOptions
	cached azcore.AccessToken
}

func (u *upstream) GetToken(_ context.Context, opts policy.TokenRequestOptions) (azcore.AccessToken, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.calls = append(u.calls, opts)
	if u.err != nil {
		return azcore.AccessToken{}, u.err
	}
	if opts.Claims != "" || time.Until(u.cached.ExpiresOn) < 5*time.Minute {
		u.cached = azcore.AccessToken{
			Token:     "up" + strings.Repeat("x", len(u.calls)),
			ExpiresOn: time.Now().Add(day),
		}
	}
	return u.cached, nil
}

func TestUpstream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &upstream{}
		cred := &Credential{Upstream: up}
		defer cred.Close()
		src := cred.TokenSource("api://x")
		tok, err := src.Token()
		if err != nil || tok.AccessToken != "upx" || tok.TokenType != "Bearer" {
			t.Fatalf("got %v, %v", tok, err)
		}
		if got := up.calls[0]; len(got.Scopes) != 1 || got.Scopes[0] != "api://x/.default" || got.Claims != "" {
			t.Errorf("asked for %+v", got)
		}
		if got := src.Status().Source; got != "upstream" {
			t.Errorf("source is %q, want upstream", got)
		}
		// The cache in between would hold it for 23 h 55 min.
		time.Sleep(day / 2)
		if tok, _ := src.Token(); tok.AccessToken != "upxx" {
			t.Errorf("after half a day: %s, want a new token", tok.AccessToken)
		}
		if got := up.calls[1].Claims; !strings.Contains(got, `"nbf"`) {
			t.Errorf("claims are %q", got)
		}
		// A challenge is passed on.
		time.Sleep(time.Minute)
		opts := policy.TokenRequestOptions{Scopes: []string{"api://x/.default"}, Claims: `{"access_token":{}}`}
		if got, err := cred.GetToken(t.Context(), opts); err != nil || got.Token != "upxxx" {
			t.Errorf("got %v, %v", got.Token, err)
		}
		if got := up.calls[2].Claims; got != opts.Claims {
			t.Errorf("claims are %q", got)
		}
	})
}

// choosy is a credential that refuses claims, as the Azure CLI's does, and keeps
// its tokens until five minutes before they expire.
type choosy struct{ upstream }

func (c *choosy) GetToken(ctx context.Context, opts policy.TokenRequestOptions) (azcore.AccessToken, error) {
	if opts.Claims != "" {
		return azcore.AccessToken{}, errors.New("az login --claims-challenge")
	}
	return c.upstream.GetToken(ctx, opts)
}

func TestUpstreamThatTakesNoClaims(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cred := &Credential{Upstream: &choosy{}}
		defer cred.Close()
		src := cred.TokenSource("r")
		for range 5 * 24 * 60 {
			if tok, err := src.Token(); err != nil || !time.Now().Before(tok.Expiry) {
				t.Fatalf("got %v", err)
			}
			time.Sleep(time.Minute)
		}
	})
}

// Those of azidentity that refuse claims are not asked with any.
func TestCredentialsWithoutClaims(t *testing.T) {
	cli, err := azidentity.NewAzureCLICredential(nil)
	if err != nil {
		t.Fatal(err)
	}
	if (&delegate{credential: cli}).takesClaims() {
		t.Error("the Azure CLI's credential takes claims")
	}
	_, err = cli.GetToken(t.Context(), policy.TokenRequestOptions{Scopes: []string{"r/.default"}, Claims: "{}"})
	if err == nil || !strings.Contains(err.Error(), "claims") {
		t.Errorf("it has learnt to: got %v", err)
	}
	if !(&delegate{credential: &upstream{}}).takesClaims() {
		t.Error("others do not")
	}
}

// The cache of a credential must not hide that whoever issues its tokens is down.
func TestUpstreamOutageShows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &outOfOrder{}
		cred := &Credential{Upstream: up}
		defer cred.Close()
		src := cred.TokenSource("r")
		if _, err := src.Token(); err != nil {
			t.Fatal(err)
		}
		up.down.Store(true)
		time.Sleep(13 * time.Hour)
		if got := src.Status(); got.Failures == 0 || got.State != "due" {
			t.Errorf("the status is %+v", got)
		}
	})
}

// outOfOrder has its cache only while it is down.
type outOfOrder struct {
	upstream
	down atomic.Bool
}

func (o *outOfOrder) GetToken(ctx context.Context, opts policy.TokenRequestOptions) (azcore.AccessToken, error) {
	if o.down.Load() && opts.Claims != "" {
		return azcore.AccessToken{}, errOutage
	}
	return o.upstream.GetToken(ctx, opts)
}

func TestUpstreamErrors(t *testing.T) {
	refusal := func(status int, body string) error {
		return &azidentity.AuthenticationFailedError{
			RawResponse: respond(&http.Request{Method: "POST"}, status, body),
		}
	}
	for _, tc := range []struct {
		name string
		err  error
		want string
	}{
		{"refused", refusal(401, `{"error":"invalid_client","error_description":"AADSTS7000215: ...","correlation_id":"c"}`),
			`upstream: the token endpoint answered 401 invalid_client: "AADSTS7000215: ..." (correlation ID c)`},
		{"a token that nobody understood", refusal(200, `{"access_token":"SECRET"}`),
			`upstream: the answer was no usable token`},
		{"not logged in", azidentity.NewCredentialUnavailableError("run\n  az login"),
			`upstream: run az login`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cred := &Credential{Upstream: &upstream{err: tc.err}}
			defer cred.Close()
			_, err := cred.TokenSource("r").Token()
			if want := `mitoken: token for "r": ` + tc.want; err == nil || err.Error() != want {
				t.Errorf("got  %v\nwant %v", err, want)
			}
		})
	}
	for name, bad := range map[string]azcore.AccessToken{
		"empty":      {ExpiresOn: time.Now().Add(time.Hour)},
		"line break": {Token: "a\r\nb", ExpiresOn: time.Now().Add(time.Hour)},
		"no expiry":  {Token: "a"},
		"expired":    {Token: "a", ExpiresOn: time.Now().Add(-time.Second)},
	} {
		cred := &Credential{Upstream: &fixed{bad}}
		if tok, err := cred.TokenSource("r").Token(); err == nil {
			t.Errorf("%s: got %v", name, tok.Expiry)
		}
		cred.Close()
	}
}

type fixed struct{ token azcore.AccessToken }

func (f *fixed) GetToken(context.Context, policy.TokenRequestOptions) (azcore.AccessToken, error) {
	return f.token, nil
}

// TestFallback is who issues the first token, after how long.
func TestFallback(t *testing.T) {
	refuse := func(*http.Request) (*http.Response, error) { return nil, syscall.ECONNREFUSED }
	connect := func(req *http.Request) {
		if trace := httptrace.ContextClientTrace(req.Context()); trace != nil {
			trace.GotConn(httptrace.GotConnInfo{})
		}
	}
	hang := func(req *http.Request) (*http.Response, error) {
		<-req.Context().Done()
		return nil, req.Context().Err()
	}
	for _, tc := range []struct {
		name   string
		answer func(n int, req *http.Request) (*http.Response, error)
		source string
		max    time.Duration
	}{
		{"nothing listens", func(_ int, req *http.Request) (*http.Response, error) { return refuse(req) },
			"upstream", reachWithin},
		{"no answer to the dial", func(_ int, req *http.Request) (*http.Response, error) { return hang(req) },
			"upstream", reachWithin},
		{"IMDS", func(_ int, req *http.Request) (*http.Response, error) {
			return respond(req, 200, validAnswer(req)), nil
		}, "imds", 0},
		{"IMDS starts late", func(n int, req *http.Request) (*http.Response, error) {
			if n == 0 {
				return refuse(req)
			}
			return respond(req, 200, validAnswer(req)), nil
		}, "imds", reachWithin},
		{"IMDS has an outage", func(n int, req *http.Request) (*http.Response, error) {
			if n < 3 {
				return respond(req, 503, ""), nil
			}
			return respond(req, 200, validAnswer(req)), nil
		}, "imds", time.Minute},
		{"IMDS is slow", func(_ int, req *http.Request) (*http.Response, error) {
			connect(req)
			time.Sleep(5 * time.Second)
			return respond(req, 200, validAnswer(req)), nil
		}, "imds", 5 * time.Second},
		{"IMDS has no identity", func(_ int, req *http.Request) (*http.Response, error) {
			return respond(req, 400, `{"error":"invalid_request","error_description":"Identity not found"}`), nil
		}, "", 0},
		{"something accepts and says nothing", func(_ int, req *http.Request) (*http.Response, error) {
			connect(req)
			return hang(req)
		}, "", flightTimeout},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := -1
				up := &upstream{}
				cred := &Credential{Fallback: up, IMDSTransport: roundTripper(func(req *http.Request) (*http.Response, error) {
					n++
					return tc.answer(n, req)
				})}
				defer cred.Close()
				src := cred.TokenSource("r")
				begin := time.Now()
				_, err := src.Token()
				if took := time.Since(begin); took > tc.max {
					t.Errorf("took %v, want at most %v", took, tc.max)
				}
				if tc.source == "" {
					if err == nil || len(up.calls) > 0 {
						t.Errorf("got %v with %d calls of the fallback, want an error with none", err, len(up.calls))
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if got := src.Status().Source; got != tc.source {
					t.Errorf("source is %q, want %q", got, tc.source)
				}
			})
		})
	}
}

// What was found out holds for good: nobody becomes somebody else.
func TestFallbackIsForGood(t *testing.T) {
	for _, there := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			up := &upstream{}
			var answers atomic.Bool
			answers.Store(there)
			cred := &Credential{Fallback: up, IMDSTransport: roundTripper(func(req *http.Request) (*http.Response, error) {
				if answers.Load() {
					return respond(req, 200, validAnswer(req)), nil
				}
				return nil, syscall.EHOSTUNREACH
			})}
			defer cred.Close()
			if _, err := cred.TokenSource("r").Token(); err != nil {
				t.Fatal(err)
			}
			answers.Store(!there)
			time.Sleep(3 * day)
			for _, resource := range []string{"r", "s"} {
				tok, err := cred.TokenSource(resource).Token()
				if there && err == nil {
					t.Errorf("%s: IMDS is gone, and there is a token", resource)
				}
				if !there && (err != nil || !strings.HasPrefix(tok.AccessToken, "up")) {
					t.Errorf("%s: got %v, want the fallback's token", resource, err)
				}
			}
			if there && len(up.calls) > 0 {
				t.Errorf("the fallback was asked %d times", len(up.calls))
			}
		})
	}
}

func TestNeitherNor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &upstream{err: errors.New("not logged in")}
		var answers atomic.Bool
		cred := &Credential{Fallback: up, IMDSTransport: roundTripper(func(req *http.Request) (*http.Response, error) {
			if answers.Load() {
				return respond(req, 200, validAnswer(req)), nil
			}
			return nil, syscall.EHOSTUNREACH
		})}
		defer cred.Close()
		src := cred.TokenSource("r")
		_, err := src.Token()
		if !errors.Is(err, ErrUnavailable) || !errors.Is(err, up.err) {
			t.Errorf("got %v, want both errors", err)
		}
		if strings.Contains(err.Error(), "set Credential.Fallback") {
			t.Errorf("%v: it is set", err)
		}
		// Nobody is anybody yet, so a late IMDS is welcome.
		time.Sleep(5 * time.Second)
		answers.Store(true)
		if _, err := src.Token(); err != nil || src.Status().Source != "imds" {
			t.Errorf("got %v from %s", err, src.Status().Source)
		}
	})
}

// IMDS answers at once, but our own limit has most of them wait: that is no sign
// that nobody is there.
func TestFallbackIsNotForTheBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limit := newLimiter()
		var wg sync.WaitGroup
		for range 30 {
			wg.Go(func() {
				m, err := newIMDS(nil, "", answering(validAnswer))
				if err != nil {
					t.Error(err)
					return
				}
				m.limit = limit
				c := newContact(m, &upstream{})
				_, err = c.issue(t.Context(), "r", round{patient: true, failed: func(error) {}})
				if err != nil || c.source() != "imds" {
					t.Errorf("got %v from %s", err, c.source())
				}
			})
		}
		wg.Wait()
	})
}

// Nor is it for who never had a turn.
func TestFallbackIsNotForWhoHasNotAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, err := newIMDS(nil, "", answering(validAnswer))
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			_ = m.limit.acquire(t.Context())
		}
		up := &upstream{}
		ctx, cancel := context.WithTimeout(t.Context(), flightTimeout)
		defer cancel()
		_, err = newContact(m, up).issue(ctx, "r", round{patient: true, failed: func(error) {}})
		if !errors.Is(err, ErrUnavailable) || len(up.calls) > 0 {
			t.Errorf("got %v after %d calls of the fallback", err, len(up.calls))
		}
	})
}

// One resource that IMDS does not know for now holds up no other.
func TestFallbackDoesNotHoldUpOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cred := &Credential{Fallback: &upstream{}, IMDSTransport: roundTripper(func(req *http.Request) (*http.Response, error) {
			if req.URL.Query().Get("resource") == "bad" {
				return respond(req, 404, ""), nil
			}
			return respond(req, 200, validAnswer(req)), nil
		})}
		defer cred.Close()
		go func() { _, _ = cred.TokenSource("bad").Token() }()
		synctest.Wait()
		begin := time.Now()
		if _, err := cred.TokenSource("good").Token(); err != nil || time.Since(begin) > 0 {
			t.Errorf("got %v after %v", err, time.Since(begin))
		}
	})
}

// Who answers the dial is there, even if its certificate is not to our liking.
func TestFallbackIsNotForABadCertificate(t *testing.T) {
	srv := httptest.NewTLSServer(nil)
	defer srv.Close()
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	up := &upstream{}
	cred := &Credential{Fallback: up, Endpoint: srv.URL}
	defer cred.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := cred.TokenSource("r").TokenContext(ctx); !errors.Is(err, ErrUnavailable) {
		t.Errorf("got %v, want ErrUnavailable", err)
	}
	if len(up.calls) > 0 {
		t.Error("the fallback was asked")
	}
}

// Many resources find out together, once.
func TestFallbackIsFoundOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &upstream{}
		j := &journal{base: roundTripper(func(*http.Request) (*http.Response, error) { return nil, syscall.EHOSTUNREACH })}
		cred := &Credential{Fallback: up, IMDSTransport: j}
		defer cred.Close()
		begin := time.Now()
		var wg sync.WaitGroup
		for _, resource := range strings.Split("a b c d e f g h", " ") {
			wg.Go(func() {
				if _, err := cred.TokenSource(resource).Token(); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if took := time.Since(begin); took > reachWithin {
			t.Errorf("took %v", took)
		}
		for _, req := range j.requests {
			if got, first := req.URL.Query().Get("resource"), j.requests[0].URL.Query().Get("resource"); got != first {
				t.Errorf("IMDS was asked for %s and %s", first, got)
			}
		}
	})
}

// While the fallback takes its time for one resource, it is asked for another, too,
// and nobody looks for IMDS again: nobody is two people.
func TestSlowFallbackHoldsUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		up := &deaf{resource: "stuck", release: make(chan struct{})}
		var started atomic.Bool
		cred := &Credential{Fallback: up, IMDSTransport: roundTripper(func(req *http.Request) (*http.Response, error) {
			if started.Load() {
				return respond(req, 200, validAnswer(req)), nil
			}
			return nil, syscall.ECONNREFUSED
		})}
		defer cred.Close()
		first := make(chan error)
		go func() {
			_, err := cred.TokenSource("stuck").Token()
			first <- err
		}()
		time.Sleep(time.Minute)
		started.Store(true)
		begin := time.Now()
		tok, err := cred.TokenSource("other").Token()
		if err != nil || !strings.HasPrefix(tok.AccessToken, "up") || time.Since(begin) > 0 {
			t.Errorf("the other resource: %v after %v", err, time.Since(begin))
		}
		close(up.release)
		if err := <-first; err != nil {
			t.Error(err)
		}
		if got := cred.TokenSource("stuck").Status().Source; got != "deaf" {
			t.Errorf("source is %s", got)
		}
	})
}

// A laptop with azidentity's default credential, and the Azure CLI logged in, has
// its first token in seconds: that credential, too, looks for IMDS first.
func TestLaptop(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("the Azure CLI of this test is a shell script")
	}
	setEnv(t, nil)
	dir := t.TempDir()
	az := `#!/bin/sh
echo '{"accessToken": "of-az", "expiresOn": "2099-01-01 00:00:00.000000", "expires_on": 4070908800, "tokenType": "Bearer"}'
`
	if err := os.WriteFile(filepath.Join(dir, "az"), []byte(az), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	t.Setenv("AZURE_TENANT_ID", "")
	silent := roundTripper(func(req *http.Request) (*http.Response, error) { // a network that drops what is for IMDS
		<-req.Context().Done()
		return nil, req.Context().Err()
	})
	options := &azidentity.DefaultAzureCredentialOptions{}
	options.Transport = &http.Client{Transport: silent}
	fallback, err := azidentity.NewDefaultAzureCredential(options)
	if err != nil {
		t.Fatal(err)
	}
	cred := &Credential{Fallback: fallback, IMDSTransport: silent}
	defer cred.Close()
	begin := time.Now()
	tok, err := cred.TokenSource("https://myapp.aztoso.com").Token()
	if err != nil || tok.AccessToken != "of-az" || time.Since(begin) > 15*time.Second {
		t.Errorf("got %v after %v", err, time.Since(begin))
	}
	if got := cred.TokenSource("https://myapp.aztoso.com").Status().Source; got != "DefaultAzureCredential" {
		t.Errorf("source is %s", got)
	}
	t.Logf("the first token took %v", time.Since(begin).Round(time.Millisecond))
}
