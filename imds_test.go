package mitoken

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
)

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// answering is a transport that answers each request with 200 and a body.
func answering(body func(*http.Request) string) roundTripper {
	return func(req *http.Request) (*http.Response, error) {
		return respond(req, http.StatusOK, body(req)), nil
	}
}

func respond(req *http.Request, status int, body string) *http.Response {
	return &http.Response{
		StatusCode: status,
		Header:     http.Header{"Content-Type": {"application/json; charset=utf-8"}},
		Body:       io.NopCloser(strings.NewReader(body)),
		Request:    req,
	}
}

// validAnswer is that of IMDS, as it is documented.
func validAnswer(req *http.Request) string {
	now := time.Now().Unix()
	return fmt.Sprintf(`{"access_token":"eyJ0.e30.c2ln","client_id":"","expires_in":"86400",`+
		`"expires_on":"%d","ext_expires_in":"86400","not_before":"%d","resource":%q,"token_type":"Bearer"}`,
		now+86400, now, req.URL.Query().Get("resource"))
}

// A journal is a transport that keeps the requests it passes on.
type journal struct {
	base http.RoundTripper

	mu       sync.Mutex
	requests []*http.Request
	times    []time.Time
}

func (j *journal) RoundTrip(req *http.Request) (*http.Response, error) {
	j.mu.Lock()
	j.requests, j.times = append(j.requests, req), append(j.times, time.Now())
	j.mu.Unlock()
	return j.base.RoundTrip(req)
}

func TestRequest(t *testing.T) {
	for _, tc := range []struct {
		name     string
		id       azidentity.ManagedIDKind
		resource string
		endpoint string
		want     string
	}{
		{"the host's identity", nil, "https://myapp.aztoso.com", "",
			"http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https%3A%2F%2Fmyapp.aztoso.com"},
		{"client ID", azidentity.ClientID("c1"), "api://x", "",
			"http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&client_id=c1&resource=api%3A%2F%2Fx"},
		{"object ID", azidentity.ObjectID("o1"), "api://x", "",
			"http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&object_id=o1&resource=api%3A%2F%2Fx"},
		{"resource ID", azidentity.ResourceID("/subscriptions/s"), "api://x", "",
			"http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&msi_res_id=%2Fsubscriptions%2Fs&resource=api%3A%2F%2Fx"},
		{"nothing is smuggled in", nil, "https://x&client_id=evil#", "",
			"http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https%3A%2F%2Fx%26client_id%3Devil%23"},
		{"another endpoint", nil, "api://x", "http://127.0.0.1:8080/",
			"http://127.0.0.1:8080/metadata/identity/oauth2/token?api-version=2018-02-01&resource=api%3A%2F%2Fx"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			j := &journal{base: answering(validAnswer)}
			cred := &Credential{ID: tc.id, Endpoint: tc.endpoint, IMDSTransport: j}
			defer cred.Close()
			if _, err := cred.TokenSource(tc.resource).Token(); err != nil {
				t.Fatal(err)
			}
			if len(j.requests) != 1 {
				t.Fatalf("%d requests, want 1", len(j.requests))
			}
			req := j.requests[0]
			if got := req.URL.String(); req.Method != "GET" || got != tc.want {
				t.Errorf("got  %s %s\nwant GET %s", req.Method, got, tc.want)
			}
			if got := req.Header["Metadata"]; len(got) != 1 || got[0] != "true" {
				t.Errorf("Metadata is %q, want true", got)
			}
			if got := req.Header.Get("X-Forwarded-For"); got != "" {
				t.Errorf("X-Forwarded-For is %q", got)
			}
		})
	}
}

func TestBadConfiguration(t *testing.T) {
	unused := roundTripper(func(*http.Request) (*http.Response, error) {
		t.Error("a request was made")
		return nil, errors.New("unused")
	})
	endpoint := func(s string) *Credential { return &Credential{Endpoint: s} }
	for _, tc := range []struct {
		name     string
		cred     *Credential
		resource string
		want     string
	}{
		{"no resource", &Credential{}, "", "resource is empty"},
		{"control character", &Credential{}, "https://x\r\nX-Evil: 1", "U+000D"},
		{"space", &Credential{}, "https://x y", "U+0020"},
		{"NUL", &Credential{}, "https://x\x00", "U+0000"},
		{"invalid UTF-8", &Credential{}, "https://x\xff", "UTF-8"},
		{"a scope", &Credential{}, "https://x/.default", `its resource is "https://x"`},
		{"empty client ID", &Credential{ID: azidentity.ClientID("")}, "r", "Credential.ID: the azidentity.ClientID is empty"},
		{"empty resource ID", &Credential{ID: azidentity.ResourceID("")}, "r", "azidentity.ResourceID is empty"},
		{"ID with a line break", &Credential{ID: azidentity.ObjectID("a\n")}, "r", "Credential.ID"},
		{"ID and Upstream", &Credential{ID: azidentity.ClientID("a"), Upstream: &upstream{}}, "r", "Credential.Upstream"},
		{"http elsewhere", endpoint("http://imds.example"), "r", "Credential.Endpoint"},
		{"look-alike", endpoint("http://169.254.169.254.evil.example"), "r", "Credential.Endpoint"},
		{"other spelling", endpoint("http://0x7f.1"), "r", "Credential.Endpoint"},
		{"mapped address", endpoint("http://[::ffff:169.254.169.254]"), "r", "Credential.Endpoint"},
		{"userinfo", endpoint("http://169.254.169.254@evil.example"), "r", "Credential.Endpoint"},
		{"private address", endpoint("http://10.0.0.1"), "r", "Credential.Endpoint"},
		{"a path", endpoint("http://127.0.0.1/metadata"), "r", "Credential.Endpoint"},
		{"a query", endpoint("http://127.0.0.1?x=1"), "r", "Credential.Endpoint"},
		{"no scheme", endpoint("169.254.169.254"), "r", "Credential.Endpoint"},
		{"another scheme", endpoint("ftp://127.0.0.1"), "r", "Credential.Endpoint"},
		{"no URL", endpoint("http://[::1"), "r", "Credential.Endpoint"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cred := tc.cred
			cred.IMDSTransport = unused
			defer cred.Close()
			src := cred.TokenSource(tc.resource)
			for range 2 {
				_, err := src.Token()
				if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.HasPrefix(err.Error(), "mitoken: ") {
					t.Errorf("got %v, want %q in it", err, tc.want)
				}
			}
			if got := src.Status(); got.State != "empty" || !strings.Contains(got.LastError, tc.want) {
				t.Errorf("status is %+v", got)
			}
		})
	}
	for _, good := range []string{
		"http://127.0.0.1:1", "http://[::1]:1", "http://localhost:1", "http://169.254.169.254",
		"http://169.254.1.2/", "http://[fe80::1]", "https://imds.example", "https://10.0.0.1",
		"http://127.0.0.1:1/?", "http://127.0.0.1:1/#",
	} {
		base, err := checkEndpoint(good)
		if want := strings.TrimRight(good, "/?#"); err != nil || base != want {
			t.Errorf("checkEndpoint(%q) = %q, %v, want %q", good, base, err, want)
		}
	}
}

// TestRetries is what a first token does about each answer of IMDS.
func TestRetries(t *testing.T) {
	status := func(n int) func(*http.Request) (*http.Response, error) {
		return func(req *http.Request) (*http.Response, error) {
			return respond(req, n, `{"error":"e","error_description":"d"}`), nil
		}
	}
	refused := &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	for _, tc := range []struct {
		name    string
		fault   func(*http.Request) (*http.Response, error)
		retried bool
	}{
		{"404", status(404), true},
		{"410", status(410), true},
		{"429", status(429), true},
		{"500", status(500), true},
		{"503", status(503), true},
		{"599", status(599), true},
		{"refused", func(*http.Request) (*http.Response, error) { return nil, refused }, true},
		{"no response at all", func(*http.Request) (*http.Response, error) { return nil, io.EOF }, true},
		{"breaks off", func(req *http.Request) (*http.Response, error) {
			resp := respond(req, 200, "")
			resp.Body = io.NopCloser(io.MultiReader(strings.NewReader(`{"access_`), broken{}))
			return resp, nil
		}, true},
		{"hangs", func(req *http.Request) (*http.Response, error) {
			<-req.Context().Done()
			return nil, req.Context().Err()
		}, true},
		{"302", status(302), false},
		{"400", status(400), false},
		{"401", status(401), false},
		{"403", status(403), false},
		{"405", status(405), false},
		{"201", status(201), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := 0
				j := &journal{base: roundTripper(func(req *http.Request) (*http.Response, error) {
					if n++; n <= 2 {
						return tc.fault(req)
					}
					return respond(req, 200, validAnswer(req)), nil
				})}
				cred := &Credential{IMDSTransport: j}
				defer cred.Close()
				_, err := cred.TokenSource("r").Token()
				if (err == nil) != tc.retried {
					t.Errorf("got %v after %d requests", err, len(j.requests))
				}
				if want := map[bool]int{true: 3, false: 1}[tc.retried]; len(j.requests) != want {
					t.Errorf("%d requests, want %d", len(j.requests), want)
				}
			})
		})
	}
}

// broken is a reader whose connection was reset.
type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, syscall.ECONNRESET }

func TestRetriesEnd(t *testing.T) {
	for _, tc := range []struct {
		name       string
		status     int
		retryAfter string
		min, max   time.Duration // of the whole round
		requests   int           // at most
	}{
		{"503", 503, "", 0, time.Minute, 6},
		{"410 for 70 s", 410, "", busyFor - 30*time.Second, flightTimeout, 100},
		{"Retry-After: 20", 429, "20", 100 * time.Second, flightTimeout, 6},
		{"Retry-After: 86400", 429, "86400", 90 * time.Second, flightTimeout, 6},
		{"429 for 70 s", 429, "-1", busyFor - 30*time.Second, flightTimeout, 100},
		{"Retry-After: 99999999999999999999", 503, "99999999999999999999", 90 * time.Second, flightTimeout, 6},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for range 20 {
				synctest.Test(t, func(t *testing.T) {
					j := &journal{base: roundTripper(func(req *http.Request) (*http.Response, error) {
						resp := respond(req, tc.status, `{"error":"busy"}`)
						if tc.retryAfter != "" {
							resp.Header.Set("Retry-After", tc.retryAfter)
						}
						return resp, nil
					})}
					cred := &Credential{IMDSTransport: j}
					defer cred.Close()
					begin := time.Now()
					_, err := cred.TokenSource("r").Token()
					if re, ok := errors.AsType[*ResponseError](err); !ok || re.StatusCode != tc.status || re.Code != "busy" {
						t.Errorf("got %v, want the %d", err, tc.status)
					}
					if took := time.Since(begin); took < tc.min || took > tc.max {
						t.Errorf("took %v, want %v to %v", took, tc.min, tc.max)
					}
					if len(j.requests) < 2 || len(j.requests) > tc.requests {
						t.Errorf("%d requests, want 2 to %d", len(j.requests), tc.requests)
					}
				})
			}
		})
	}
}

// IMDS is away for 70 seconds, and no first token fails for it.
func TestGoneIsRiddenOut(t *testing.T) {
	for range 50 {
		synctest.Test(t, func(t *testing.T) {
			back := time.Now().Add(busyFor)
			cred := &Credential{IMDSTransport: roundTripper(func(req *http.Request) (*http.Response, error) {
				if time.Now().Before(back) {
					return respond(req, http.StatusGone, ""), nil
				}
				return respond(req, 200, validAnswer(req)), nil
			})}
			defer cred.Close()
			if _, err := cred.TokenSource("r").Token(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestUnavailable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refused := &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
		cred := &Credential{IMDSTransport: roundTripper(func(*http.Request) (*http.Response, error) {
			return nil, refused
		})}
		defer cred.Close()
		_, err := cred.TokenSource("https://myapp.aztoso.com").Token()
		if !errors.Is(err, ErrUnavailable) || !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("got %v, want ErrUnavailable", err)
		}
		want := `mitoken: token for "https://myapp.aztoso.com": no metadata service answered at ` +
			`http://169.254.169.254 in 6 tries: dial tcp: connect: connection refused; ` +
			`on a developer's machine, set Credential.Fallback, for example to azidentity's AzureCLICredential`
		if err.Error() != want {
			t.Errorf("got  %v\nwant %v", err, want)
		}
	})
}

// The end of a round takes nothing from what its error is.
func TestErrorsKeepTheirClass(t *testing.T) {
	hang := func(req *http.Request) (*http.Response, error) {
		<-req.Context().Done()
		return nil, req.Context().Err()
	}
	t.Run("many that hang", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			cred := &Credential{IMDSTransport: roundTripper(hang)}
			defer cred.Close()
			var wg sync.WaitGroup
			for n := range 60 {
				wg.Go(func() {
					_, err := cred.TokenSource(fmt.Sprint("r", n)).Token()
					if !errors.Is(err, ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) {
						t.Errorf("got %v, want ErrUnavailable", err)
					}
				})
			}
			wg.Wait()
		})
	})
	t.Run("refused, then hangs", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			n := 0
			cred := &Credential{IMDSTransport: roundTripper(func(req *http.Request) (*http.Response, error) {
				if n++; n > 1 {
					return hang(req)
				}
				return respond(req, 503, ""), nil
			})}
			defer cred.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			_, err := cred.TokenSource("r").TokenContext(ctx)
			if _, ok := errors.AsType[*ResponseError](err); !ok || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v, want the 503 and the deadline", err)
			}
		})
	})
}

// All who ask IMDS itself share one limit. Others have their own.
func TestWhoSharesTheLimit(t *testing.T) {
	for _, tc := range []struct {
		endpoint string
		base     http.RoundTripper
		shared   bool
	}{
		{"", nil, true}, {"http://127.0.0.1:1", nil, false}, {"", &journal{}, false},
	} {
		m, err := newIMDS(nil, tc.endpoint, tc.base)
		if err != nil || (m.limit == hostLimiter) != tc.shared {
			t.Errorf("%+v: %v", tc, err)
		}
	}
	if !hostTransport.DisableCompression || !hostTransport.DisableKeepAlives || hostTransport.MaxResponseHeaderBytes == 0 {
		t.Error("hostTransport is not what it has to be")
	}
}

// A body without an end is cut off.
func TestEndlessBody(t *testing.T) {
	cred := &Credential{IMDSTransport: roundTripper(func(req *http.Request) (*http.Response, error) {
		resp := respond(req, 200, "")
		resp.Body = io.NopCloser(endless{})
		return resp, nil
	})}
	defer cred.Close()
	if _, err := cred.TokenSource("r").Token(); err == nil || !strings.Contains(err.Error(), "longer than 65536 bytes") {
		t.Errorf("got %v", err)
	}
}

type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

// A timeout of ours must not look like the caller's.
func TestTimeoutsAreOurs(t *testing.T) {
	for name, fault := range map[string]func(*http.Request) (*http.Response, error){
		"of a try": func(req *http.Request) (*http.Response, error) {
			<-req.Context().Done()
			return nil, req.Context().Err()
		},
		"of a dial": func(*http.Request) (*http.Response, error) {
			return nil, &net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cred := &Credential{IMDSTransport: roundTripper(fault)}
				defer cred.Close()
				_, err := cred.TokenSource("r").Token()
				if !errors.Is(err, ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) || os.IsTimeout(err) {
					t.Errorf("got %v, want ErrUnavailable", err)
				}
				const patience = time.Millisecond // less than any round takes
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				begin := time.Now()
				_, err = cred.TokenSource("other").TokenContext(ctx)
				tried := name == "of a dial" // within a millisecond
				if !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrUnavailable) != tried ||
					time.Since(begin) != patience {
					t.Errorf("got %v after %v, want the caller's deadline", err, time.Since(begin))
				}
			})
		})
	}
}

func TestRedirectIsNotFollowed(t *testing.T) {
	for _, status := range []int{300, 301, 302, 303, 307, 308} {
		j := &journal{base: roundTripper(func(req *http.Request) (*http.Response, error) {
			resp := respond(req, status, "")
			resp.Header.Set("Location", "http://evil.example/")
			return resp, nil
		})}
		cred := &Credential{IMDSTransport: j}
		_, err := cred.TokenSource("r").Token()
		if re, ok := errors.AsType[*ResponseError](err); !ok || re.StatusCode != status {
			t.Errorf("%d: got %v", status, err)
		}
		if len(j.requests) != 1 {
			t.Errorf("%d: %d requests, want 1", status, len(j.requests))
		}
		cred.Close()
	}
}

// The process environment names a proxy. ProxyFromEnvironment reads it once per
// process, so this is a process of its own.
func TestProxyIsIgnored(t *testing.T) {
	if endpoint := os.Getenv("MITOKEN_TEST_ENDPOINT"); endpoint != "" {
		cred := &Credential{Endpoint: endpoint}
		defer cred.Close()
		if _, err := cred.TokenSource("r").Token(); err != nil {
			t.Fatal(err)
		}
		return
	}
	proxied := make(chan string, 10)
	proxy := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		proxied <- r.URL.String()
	}))
	defer proxy.Close()
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, validAnswer(r))
	}))
	defer service.Close()
	cmd := exec.Command(os.Args[0], "-test.run=^TestProxyIsIgnored$")
	cmd.Env = append(os.Environ(), "MITOKEN_TEST_ENDPOINT="+service.URL)
	for _, name := range []string{"HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"} {
		cmd.Env = append(cmd.Env, name+"="+proxy.URL)
	}
	cmd.Env = append(cmd.Env, "NO_PROXY=", "no_proxy=")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if hostTransport.Proxy != nil { // loopback is exempt from the environment's proxies, IMDS is not
		t.Error("hostTransport has a proxy")
	}
	select {
	case u := <-proxied:
		t.Errorf("the proxy was asked for %s", u)
	default:
	}
}

func TestLimiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var starts []time.Time
		under, most := 0, 0
		j := roundTripper(func(req *http.Request) (*http.Response, error) {
			mu.Lock()
			starts = append(starts, time.Now())
			under++
			most = max(most, under)
			mu.Unlock()
			time.Sleep(30 * time.Millisecond)
			mu.Lock()
			under--
			mu.Unlock()
			return respond(req, 200, validAnswer(req)), nil
		})
		cred := &Credential{IMDSTransport: j}
		defer cred.Close()
		var wg sync.WaitGroup
		for n := range 50 {
			wg.Go(func() {
				if _, err := cred.TokenSource(fmt.Sprint("r", n)).Token(); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if most != 2 {
			t.Errorf("%d requests at a time, want 2", most)
		}
		for n := 5; n < len(starts); n++ {
			if got := starts[n].Sub(starts[n-5]); got < time.Second {
				t.Errorf("requests %d to %d came within %v", n-5, n, got)
			}
		}
		if got := starts[49].Sub(starts[0]); got > 10*time.Second {
			t.Errorf("50 requests took %v", got)
		}
	})
}

func TestLimiterLetsGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimiter()
		for range 5 {
			if err := l.acquire(t.Context()); err != nil {
				t.Fatal(err)
			}
			l.release()
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		for range 10 { // who waits for a start, and leaves
			if err := l.acquire(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v, want the deadline", err)
			}
		}
		_ = l.acquire(t.Context())
		_ = l.acquire(t.Context())
		ctx, cancel2 := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel2()
		if err := l.acquire(ctx); !errors.Is(err, context.DeadlineExceeded) { // or a slot
			t.Errorf("got %v, want the deadline", err)
		}
		l.release()
		if err := l.acquire(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

func TestIMDSErrorText(t *testing.T) {
	for _, tc := range []struct {
		name   string
		status int
		header string // X-Ms-Request-Id
		body   string
		want   string
	}{
		{"identity not found", 400, "", `{"error":"invalid_request","error_description":"Identity not found"}`,
			`the metadata service answered 400 invalid_request: "Identity not found"; ` +
				`is the identity assigned to this host, and Credential.ID right?`},
		{"no such resource", 400, "", `{"error":"invalid_resource","error_description":"AADSTS500011: ...","correlation_id":"c1"}`,
			`the metadata service answered 400 invalid_resource: "AADSTS500011: ..." (correlation ID c1); ` +
				`is the resource the App ID URI of a service in this tenant?`},
		{"nested", 401, "h1", `{"error":{"code":"Denied","message":"no\r\nway"}}`,
			`the metadata service answered 401 Denied: "no way" (correlation ID h1)`},
		{"no JSON", 403, "", `<html>`,
			`the metadata service answered 403 Forbidden; is a proxy or a network policy in between?`},
		{"a token, of all things", 400, "", `{"access_token":"SECRET"}`,
			`the metadata service answered 400 Bad Request; is the identity assigned to this host, and Credential.ID right?`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cred := &Credential{IMDSTransport: roundTripper(func(req *http.Request) (*http.Response, error) {
				resp := respond(req, tc.status, tc.body)
				resp.Header.Set("X-Ms-Request-Id", tc.header)
				return resp, nil
			})}
			defer cred.Close()
			_, err := cred.TokenSource("r").Token()
			if want := `mitoken: token for "r": ` + tc.want; err == nil || err.Error() != want {
				t.Errorf("got  %v\nwant %v", err, want)
			}
		})
	}
}
