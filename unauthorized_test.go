package mitoken

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aztoso/mitoken/imdsfake"
)

// picky is a service that takes some tokens, and says of others that they are
// invalid.
type picky struct {
	takes     func(token string) bool
	challenge string // of its 401; that of an invalid token if empty

	mu     sync.Mutex
	tokens []string // as they came
	bodies []string
}

func (p *picky) RoundTrip(req *http.Request) (*http.Response, error) {
	var body []byte
	if req.Body != nil {
		body, _ = io.ReadAll(req.Body)
		req.Body.Close()
	}
	token := strings.TrimPrefix(req.Header.Get("Authorization"), "Bearer ")
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tokens = append(p.tokens, token)
	p.bodies = append(p.bodies, string(body))
	if p.takes(token) {
		return respond(req, 200, "welcome"), nil
	}
	resp := respond(req, 401, "no")
	resp.Header.Set("WWW-Authenticate", `Bearer error="invalid_token"`)
	if p.challenge != "" {
		resp.Header.Set("WWW-Authenticate", p.challenge)
	}
	return resp, nil
}

func never(string) bool { return false }

// notThe first token that it sees.
func notTheFirst() func(string) bool {
	first := ""
	return func(token string) bool {
		if first == "" {
			first = token
		}
		return token != first
	}
}

func get(t *testing.T, tr *Transport, req *http.Request) (int, string) {
	t.Helper()
	resp, err := tr.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.Request != req {
		t.Errorf("got %v; the response is of its request: %v", err, resp.Request == req)
	}
	return resp.StatusCode, string(body)
}

// TestUnauthorized is what a 401 leads to: how many requests of the service, how
// many of IMDS, and which answer counts.
func TestUnauthorized(t *testing.T) {
	text := func(s string) io.Reader { return strings.NewReader(s) }
	stream := func(s string) io.Reader { return io.MultiReader(strings.NewReader(s)) } // without GetBody
	for _, tc := range []struct {
		name   string
		cache  imdsfake.Cache
		takes  func(string) bool
		chal   string
		pass   bool
		body   io.Reader
		fault  imdsfake.Fault
		status int
		sent   int // requests of the service
		asked  int // requests of IMDS
	}{
		{"a new token helps", imdsfake.NoCache, notTheFirst(), "", false, nil, imdsfake.Fault{}, 200, 2, 2},
		{"a body that can be sent again", imdsfake.NoCache, notTheFirst(), "", false, text("body"), imdsfake.Fault{}, 200, 2, 2},
		{"a body that cannot", imdsfake.NoCache, notTheFirst(), "", false, stream("body"), imdsfake.Fault{}, 401, 1, 2},
		{"a new token does not help", imdsfake.NoCache, never, "", false, nil, imdsfake.Fault{}, 401, 2, 2},
		{"the same token comes", imdsfake.UntilExpiry, never, "", false, nil, imdsfake.Fault{}, 401, 1, 2},
		{"IMDS is down", imdsfake.NoCache, never, "", false, nil, imdsfake.Fault{Status: 503}, 401, 1, 2},
		{"IMDS is deaf", imdsfake.NoCache, never, "", false, nil, imdsfake.Fault{Failure: imdsfake.Hang}, 401, 1, 2},
		{"switched off", imdsfake.NoCache, notTheFirst(), "", true, nil, imdsfake.Fault{}, 401, 1, 1},
		{"not of the token", imdsfake.NoCache, notTheFirst(), `Bearer error="insufficient_scope"`, false, nil, imdsfake.Fault{}, 401, 1, 1},
		{"no error", imdsfake.NoCache, notTheFirst(), `Bearer realm="x"`, false, nil, imdsfake.Fault{}, 401, 1, 1},
		{"Basic", imdsfake.NoCache, notTheFirst(), `Basic realm="x"`, false, nil, imdsfake.Fault{}, 401, 1, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := &imdsfake.Handler{Cache: tc.cache}
				cred := &Credential{IMDSTransport: fake}
				defer cred.Close()
				src := cred.TokenSource("https://x.example")
				before, err := src.Token()
				if err != nil {
					t.Fatal(err)
				}
				if tc.fault.Status != 0 || tc.fault.Failure != "" {
					fake.Inject(tc.fault)
				}
				service := &picky{takes: tc.takes, challenge: tc.chal}
				tr := &Transport{Source: src, Base: service, PassUnauthorized: tc.pass}
				req, err := http.NewRequest(http.MethodPost, "https://x.example/", tc.body)
				if err != nil {
					t.Fatal(err)
				}
				status, body := get(t, tr, req)
				if status != tc.status || body != map[int]string{200: "welcome", 401: "no"}[status] {
					t.Errorf("got %d %s, want %d", status, body, tc.status)
				}
				time.Sleep(time.Minute) // for a refresh that nobody waits for
				if len(service.tokens) != tc.sent || len(fake.Requests()) != tc.asked {
					t.Errorf("%d requests of the service and %d of IMDS, want %d and %d", len(service.tokens), len(fake.Requests()), tc.sent, tc.asked)
				}
				for i, b := range service.bodies {
					if tc.body != nil && b != "body" {
						t.Errorf("request %d had the body %q", i, b)
					}
				}
				// The token is kept, whatever the service says, and nothing is refreshed
				// before its time because of it.
				after, err := src.Token()
				if err != nil || tc.status == 401 && tc.sent == 1 && tc.asked == 2 && tc.body == nil && after != before {
					t.Errorf("afterwards: %v, another token: %v", err, after != before)
				}
				n := len(fake.Requests())
				time.Sleep(9 * time.Hour)
				if got := len(fake.Requests()); got != n {
					t.Errorf("%d more requests of IMDS in nine hours", got-n)
				}
			})
		})
	}
}

// A service that says 401 to everything costs IMDS a request in five minutes, not
// one for each call, and the next call has a valid token.
func TestUnauthorizedStorm(t *testing.T) {
	for _, fault := range []imdsfake.Fault{{}, {Status: 503}} {
		synctest.Test(t, func(t *testing.T) {
			fake := &imdsfake.Handler{Cache: imdsfake.NoCache}
			cred := &Credential{IMDSTransport: fake}
			defer cred.Close()
			src := cred.TokenSource("https://x.example")
			if _, err := src.Token(); err != nil {
				t.Fatal(err)
			}
			if fault.Status != 0 {
				fake.Inject(fault)
			}
			service := &picky{takes: never}
			client := &http.Client{Transport: &Transport{Source: src, Base: service}}
			begin := time.Now()
			var wg sync.WaitGroup
			var failed atomic.Int64
			for range 100 {
				wg.Go(func() {
					for range 100 {
						resp, err := client.Get("https://x.example/")
						if err != nil || resp.StatusCode != 401 {
							failed.Add(1)
							continue
						}
						resp.Body.Close()
						time.Sleep(10 * time.Second)
					}
				})
			}
			wg.Wait()
			windows := int(time.Since(begin)/(5*time.Minute)) + 1
			if asked := len(fake.Requests()) - 1; asked > windows || asked < 2 || failed.Load() > 0 {
				t.Errorf("%d requests of IMDS in %v; %d calls failed", asked, time.Since(begin), failed.Load())
			}
			if sent := len(service.tokens); sent > 2*10_000 {
				t.Errorf("%d requests of the service", sent)
			}
			if got := src.Status(); got.State != "fresh" || got.Survives < 12*time.Hour {
				t.Errorf("the status is %+v", got)
			}
		})
	}
}

// Whoever leaves while the other token is asked for, leaves.
func TestUnauthorizedCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := &imdsfake.Handler{Cache: imdsfake.NoCache}
		cred := &Credential{IMDSTransport: fake}
		defer cred.Close()
		src := cred.TokenSource("https://x.example")
		if _, err := src.Token(); err != nil {
			t.Fatal(err)
		}
		fake.Inject(imdsfake.Fault{Failure: imdsfake.Hang})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		req, _ := http.NewRequestWithContext(ctx, "GET", "https://x.example/", nil)
		begin := time.Now()
		status, _ := get(t, &Transport{Source: src, Base: &picky{takes: never}}, req)
		if took := time.Since(begin); status != 401 || took != time.Second {
			t.Errorf("got %d after %v", status, took)
		}
	})
}

// broken is a body that cannot be had a second time, though it says so.
func TestUnauthorizedBrokenBody(t *testing.T) {
	cred := &Credential{IMDSTransport: &imdsfake.Handler{Cache: imdsfake.NoCache}}
	defer cred.Close()
	service := &picky{takes: notTheFirst()}
	tr := &Transport{Source: cred.TokenSource("https://x.example"), Base: service}
	req, _ := http.NewRequest("PUT", "https://x.example/", strings.NewReader("body"))
	req.GetBody = func() (io.ReadCloser, error) { return nil, errors.New("gone") }
	if status, _ := get(t, tr, req); status != 401 || len(service.tokens) != 1 {
		t.Errorf("got %d after %d requests", status, len(service.tokens))
	}
	// The second try may fail on its way. Then the first answer is the answer.
	failing := roundTripper(func(req *http.Request) (*http.Response, error) {
		if len(service.tokens) > 1 {
			return nil, errors.New("broken pipe")
		}
		return service.RoundTrip(req)
	})
	service.tokens, service.takes = []string{""}, never
	tr = &Transport{Source: cred.TokenSource("https://y.example"), Base: failing}
	req, _ = http.NewRequest("GET", "https://y.example/", nil)
	if status, body := get(t, tr, req); status != 401 || body != "no" {
		t.Errorf("got %d %s", status, body)
	}
}
