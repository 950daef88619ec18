package mitoken

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"reflect"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/oauth2"
)

const bearerOf = "Bearer eyJ0.e30.c2ln" // validAnswer's token

// newSource returns a source whose token is at hand.
func newSource(t *testing.T, resource string) *TokenSource {
	cred := &Credential{IMDSTransport: answering(validAnswer)}
	t.Cleanup(func() { cred.Close() })
	src := cred.TokenSource(resource)
	if _, err := src.Token(); err != nil {
		t.Fatal(err)
	}
	return src
}

// noSource fails the test if it is asked for a token.
type noSource struct{ t *testing.T }

func (s noSource) Token() (*oauth2.Token, error) {
	s.t.Error("a token was asked for")
	return nil, errors.New("no token")
}

// closeCounter is a request body that counts how often it is closed.
type closeCounter struct {
	io.Reader
	closed int
}

func (c *closeCounter) Close() error { c.closed++; return nil }

// sink is a base that closes the body and keeps the request.
type sink struct{ got *http.Request }

func (s *sink) RoundTrip(req *http.Request) (*http.Response, error) {
	s.got = req
	if req.Body != nil {
		_ = req.Body.Close()
	}
	return respond(req, 200, ""), nil
}

// TestOrigins is which requests get a token. Those that do not are refused.
func TestOrigins(t *testing.T) {
	const api = "https://api.example.com"
	for _, tc := range []struct {
		name    string
		origins []string
		url     string
		token   bool
	}{
		{"same origin", []string{api}, "https://api.example.com/x?y", true},
		{"default port written out", []string{api}, "https://api.example.com:443/", true},
		{"default port listed", []string{api + ":443"}, "https://api.example.com/", true},
		{"upper case", []string{api}, "https://API.Example.COM/", true},
		{"upper case listed", []string{"https://API.example.com/"}, "https://api.example.com", true},
		{"second one listed", []string{"https://a.example", api}, "https://api.example.com", true},
		{"userinfo", []string{api}, "https://user@api.example.com/", true},
		{"IPv6", []string{"https://[2001:db8::1]:8443"}, "https://[2001:db8::1]:8443/", true},
		{"listed loopback", []string{"http://127.0.0.1:8080"}, "http://127.0.0.1:8080/", true},
		{"listed localhost", []string{"http://localhost"}, "http://localhost:80/", true},

		{"other host", []string{api}, "https://evil.example/", false},
		{"subdomain", []string{api}, "https://x.api.example.com/", false},
		{"parent domain", []string{api}, "https://example.com/", false},
		{"prefix", []string{api}, "https://api.example.com.evil.example/", false},
		{"other port", []string{api}, "https://api.example.com:8443/", false},
		{"downgrade", []string{api}, "http://api.example.com/", false},
		{"downgrade on the https port", []string{api}, "http://api.example.com:443/", false},
		{"host as userinfo", []string{api}, "https://api.example.com@evil.example/", false},
		{"trailing dot", []string{api}, "https://api.example.com./", false},
		{"fullwidth letters", []string{api}, "https://ａpi.example.com/", false},
		{"Kelvin sign", []string{"https://k.example"}, "https://\u212a.example/", false},
		{"other spelling of an address", []string{"https://[::1]"}, "https://[0:0::1]/", false},
		{"zone", []string{"https://[fe80::1]"}, "https://[fe80::1%25eth0]/", false},
		{"other loopback port", []string{"http://127.0.0.1:8080"}, "http://127.0.0.1:8081/", false},
		{"other loopback address", []string{"http://127.0.0.1:8080"}, "http://localhost:8080/", false},
		{"no scheme", []string{api}, "//api.example.com/", false},
		{"no host", []string{api}, "https:///x", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			req, err := http.NewRequest("POST", tc.url, nil)
			if err != nil {
				t.Fatal(err)
			}
			body := &closeCounter{Reader: strings.NewReader("body")}
			req.Body = body
			base := &sink{}
			tr := &Transport{Source: noSource{t}, Base: base, Origins: tc.origins}
			if tc.token {
				tr.Source = newSource(t, "api://x")
			}
			_, err = tr.RoundTrip(req)
			if tc.token {
				if err != nil || base.got.Header.Get("Authorization") != bearerOf {
					t.Errorf("got %v, want a token", err)
				}
			} else if oe, ok := errors.AsType[*OriginError](err); !ok || base.got != nil || !strings.HasSuffix(oe.Origin, req.URL.Host) {
				t.Errorf("got %v, want an OriginError", err)
			}
			if body.closed != 1 {
				t.Errorf("the body was closed %d times", body.closed)
			}
		})
	}
}

func TestOriginOfResource(t *testing.T) {
	for _, tc := range []struct {
		resource string
		url      string
		want     string // of the error; empty if there is none
	}{
		{"https://myapp.aztoso.com", "https://myapp.aztoso.com/orders", ""},
		{"https://myapp.aztoso.com/", "https://myapp.aztoso.com/orders", ""},
		{"https://myapp.aztoso.com:8443/v1", "https://myapp.aztoso.com:8443/", ""},
		{"https://myapp.aztoso.com", "https://other.aztoso.com/", `no token goes to "https://other.aztoso.com"`},
		{"api://5e29463d", "https://myapp.aztoso.com", `the resource "api://5e29463d" is not an https URL`},
		{"http://127.0.0.1:1", "http://127.0.0.1:1/", "is not an https URL"},
		{"https:opaque", "https://myapp.aztoso.com", "is not an https URL"},
		{"https://bücher.example", "https://bücher.example", "xn-- form"},
		{"", "https://myapp.aztoso.com", "resource is empty"},
	} {
		t.Run(tc.resource, func(t *testing.T) {
			cred := &Credential{IMDSTransport: answering(validAnswer)}
			defer cred.Close()
			tr := &Transport{Source: cred.TokenSource(tc.resource), Base: &sink{}}
			req, _ := http.NewRequest("GET", tc.url, nil)
			for range 2 {
				_, err := tr.RoundTrip(req)
				if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
					t.Errorf("got %v, want %q", err, tc.want)
				}
			}
		})
	}
}

func TestTransportMisconfigured(t *testing.T) {
	for _, tc := range []struct {
		name string
		tr   *Transport
		want string
	}{
		{"no source", &Transport{}, "Transport.Source is nil"},
		{"nil TokenSource", &Transport{Source: (*TokenSource)(nil)}, "Transport.Source is nil"},
		{"foreign source without origins", &Transport{Source: noSource{t}}, "Transport.Origins is empty"},
		{"TokenSource from nowhere", &Transport{Source: &TokenSource{}}, "made by Credential.TokenSource"},
		{"http", &Transport{Source: noSource{t}, Origins: []string{"http://api.example.com"}}, "clear text"},
		{"http of a private address", &Transport{Source: noSource{t}, Origins: []string{"http://10.0.0.1"}}, "clear text"},
		{"http of a link-local address", &Transport{Source: noSource{t}, Origins: []string{"http://169.254.169.254"}}, "clear text"},
		{"no scheme", &Transport{Source: noSource{t}, Origins: []string{"api.example.com"}}, "not of the form"},
		{"a path", &Transport{Source: noSource{t}, Origins: []string{"https://api.example.com/v1"}}, "not of the form"},
		{"a wildcard scheme", &Transport{Source: noSource{t}, Origins: []string{"*://api.example.com"}}, "not of the form"},
		{"second of two", &Transport{Source: noSource{t}, Origins: []string{"https://a", "ftp://b"}}, "neither https"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			body := &closeCounter{Reader: strings.NewReader("body")}
			req, _ := http.NewRequest("POST", "https://api.example.com", body)
			req.Body = body
			_, err := tc.tr.RoundTrip(req)
			if err == nil || !strings.Contains(err.Error(), tc.want) || !strings.HasPrefix(err.Error(), "mitoken: ") {
				t.Errorf("got %v, want %q", err, tc.want)
			}
			if body.closed != 1 {
				t.Errorf("the body was closed %d times", body.closed)
			}
		})
	}
	// A source that could not be made says why.
	cred := &Credential{Endpoint: "http://evil.example"}
	tr := &Transport{Source: cred.TokenSource("https://x"), Origins: []string{"https://x"}}
	req, _ := http.NewRequest("GET", "https://x", nil)
	if _, err := tr.RoundTrip(req); err == nil || !strings.Contains(err.Error(), "Credential.Endpoint") {
		t.Errorf("got %v, want the mistake in Endpoint", err)
	}
}

func TestHostHeaderCounts(t *testing.T) {
	tr := &Transport{Source: newSource(t, "https://api.example.com"), Base: &sink{}}
	for host, token := range map[string]bool{
		"":                    true,
		"api.example.com":     true,
		"API.example.com:443": true,
		"evil.example":        false,
	} {
		req, _ := http.NewRequest("GET", "https://api.example.com", nil)
		req.Host = host
		if _, err := tr.RoundTrip(req); (err == nil) != token {
			t.Errorf("Host %q: got %v", host, err)
		}
	}
}

// The caller's request is as it was, and may be in use elsewhere.
func TestRequestIsNotModified(t *testing.T) {
	base := &sink{}
	tr := &Transport{Source: newSource(t, "https://x"), Base: base}
	for _, header := range []http.Header{nil, {}, {"Accept": {"a", "b"}, "X": nil}} {
		req, _ := http.NewRequest("GET", "https://x/y", nil)
		req.Header = header
		want := req.Clone(t.Context())
		want = want.WithContext(req.Context())
		for range 3 {
			resp, err := tr.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(req, want) {
				t.Errorf("the request is %+v, was %+v", req, want)
			}
			if resp.Request != req {
				t.Error("the response is of a request that has the token")
			}
			if got := base.got.Header["Authorization"]; len(got) != 1 || got[0] != bearerOf {
				t.Errorf("Authorization is %q", got)
			}
			if len(base.got.Header) != len(header)+1 || !reflect.DeepEqual(base.got.Header["Accept"], header["Accept"]) {
				t.Errorf("the header is %v", base.got.Header)
			}
			base.got.Header["Authorization"][0] = "overwritten by a careless base"
		}
	}
}

// A base that clones the request shows the token to nobody above us, and one that
// does not say which request it answers does not make us forget where we were.
func TestRequestOfTheResponse(t *testing.T) {
	src := newSource(t, "https://a.example")
	for name, request := range map[string]func(*http.Request) *http.Request{
		"clone": func(req *http.Request) *http.Request { return req.Clone(req.Context()) },
		"nil":   func(*http.Request) *http.Request { return nil },
	} {
		t.Run(name, func(t *testing.T) {
			var back string
			base := roundTripper(func(req *http.Request) (*http.Response, error) {
				resp := respond(req, 302, "")
				resp.Request = request(req)
				switch req.URL.Host + req.URL.Path {
				case "a.example/":
					resp.Header.Set("Location", "https://evil.example/")
				case "evil.example/":
					resp.Header.Set("Location", "https://a.example/delete")
				default:
					resp.StatusCode = 200
					back = req.Header.Get("Authorization")
				}
				return resp, nil
			})
			client := &http.Client{Transport: &Transport{Source: src, Base: base}}
			resp, err := client.Get("https://a.example/")
			if err != nil {
				t.Fatal(err)
			}
			if back != "" || resp.Request.Header.Get("Authorization") != "" {
				t.Errorf("the token went back as %q, and is in the response's request as %q",
					back, resp.Request.Header.Get("Authorization"))
			}
		})
	}
}

func TestOneRequestManyGoroutines(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if got := r.Header["Authorization"]; len(got) != 1 || got[0] != bearerOf {
			t.Errorf("Authorization is %q", got)
		}
	}))
	defer srv.Close()
	client := &http.Client{Transport: &Transport{Source: newSource(t, "api://x"), Origins: []string{srv.URL}, Base: srv.Client().Transport}}
	req, _ := http.NewRequest("GET", srv.URL, nil)
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			resp, err := client.Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			resp.Body.Close()
		})
	}
	wg.Wait()
}

func TestOwnAuthorizationIsLeftAlone(t *testing.T) {
	base := &sink{}
	tr := &Transport{Source: noSource{t}, Base: base, Origins: []string{"https://x"}}
	for _, target := range []string{"https://x", "https://elsewhere.example"} {
		req, _ := http.NewRequest("GET", target, nil)
		req.Header.Set("Authorization", "Basic abc")
		if _, err := tr.RoundTrip(req); err != nil || base.got != req {
			t.Errorf("%s: got %v, want the request as it is", target, err)
		}
	}
}

// TestRedirects follows real redirects over real servers: only the listed one
// sees the token, and not once it has been left.
func TestRedirects(t *testing.T) {
	for _, status := range []int{301, 302, 303, 307, 308} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			var a, b *httptest.Server
			seen := map[string][]string{} // path at a server: tokens
			record := func(name string, r *http.Request) {
				seen[name+r.URL.Path] = append(seen[name+r.URL.Path], r.Header.Get("Authorization"))
			}
			a = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				record("a", r)
				switch r.URL.Path {
				case "/home":
					http.Redirect(w, r, "/there", status)
				case "/there":
					http.Redirect(w, r, b.URL+"/away", status)
				}
			}))
			defer a.Close()
			b = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				record("b", r)
				http.Redirect(w, r, a.URL+"/back", status)
			}))
			defer b.Close()
			client := &http.Client{Transport: &Transport{
				Source: newSource(t, "api://x"), Origins: []string{a.URL}, Base: a.Client().Transport,
			}}
			resp, err := client.Post(a.URL+"/home", "text/plain", strings.NewReader("body"))
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			want := map[string][]string{
				"a/home": {bearerOf}, "a/there": {bearerOf}, "b/away": {""}, "a/back": {""},
			}
			if !reflect.DeepEqual(seen, want) {
				t.Errorf("got  %q\nwant %q", seen, want)
			}
		})
	}
}

// x/oauth2's transport, beside it, sends the token wherever it is led.
func TestRedirectsOfOauth2(t *testing.T) {
	var leaked string
	evil := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		leaked = r.Header.Get("Authorization")
	}))
	defer evil.Close()
	srv := httptest.NewServer(http.RedirectHandler(evil.URL, http.StatusFound))
	defer srv.Close()
	client := &http.Client{Transport: &oauth2.Transport{Source: newSource(t, "api://x")}}
	resp, err := client.Get(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if leaked != bearerOf {
		t.Errorf("oauth2.Transport has learnt: it sent %q. Say so where we compare", leaked)
	}
}

func TestContextEndsTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cred := &Credential{IMDSTransport: roundTripper(func(req *http.Request) (*http.Response, error) {
			<-req.Context().Done()
			return nil, req.Context().Err()
		})}
		defer cred.Close()
		tr := &Transport{Source: cred.TokenSource("https://x"), Base: &sink{}}
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		body := &closeCounter{Reader: strings.NewReader("body")}
		req, _ := http.NewRequestWithContext(ctx, "POST", "https://x", body)
		req.Body = body
		begin := time.Now()
		if _, err := tr.RoundTrip(req); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the deadline", err)
		}
		if took := time.Since(begin); took != 50*time.Millisecond || body.closed != 1 {
			t.Errorf("took %v, the body was closed %d times", took, body.closed)
		}
	})
}

func TestForeignSource(t *testing.T) {
	src := &foreign{tok: &oauth2.Token{AccessToken: "one"}}
	base := &sink{}
	tr := &Transport{Source: src, Base: base, Origins: []string{"https://x"}}
	send := func() (string, error) {
		req, _ := http.NewRequest("GET", "https://x", nil)
		base.got = nil
		_, err := tr.RoundTrip(req)
		if err != nil {
			return "", err
		}
		return base.got.Header.Get("Authorization"), nil
	}
	for _, want := range []string{"one", "one", "two"} {
		src.tok = &oauth2.Token{AccessToken: want, TokenType: "bearer"}
		if got, err := send(); got != "Bearer "+want || err != nil {
			t.Errorf("got %q, %v", got, err)
		}
	}
	if got := testing.AllocsPerRun(100, func() { _, _ = tr.header(t.Context()) }); got != 0 {
		t.Errorf("the header is built again: %v allocations", got)
	}
	for name, tok := range map[string]*oauth2.Token{
		"empty":       {},
		"line break":  {AccessToken: "SECRET\r\nX: 1"},
		"other type":  {AccessToken: "SECRET", TokenType: "MAC"},
		"nil":         nil,
		"with spaces": {AccessToken: "a SECRET"},
	} {
		src.tok = tok
		if got, err := send(); err == nil || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%s: got %q, %v, want an error", name, got, err)
		}
	}
	src.err = io.ErrUnexpectedEOF
	if _, err := send(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("got %v, want the source's", err)
	}
}

type foreign struct {
	tok *oauth2.Token
	err error
}

func (f *foreign) Token() (*oauth2.Token, error) { return f.tok, f.err }

func TestRoundTripWithoutURL(t *testing.T) {
	tr := &Transport{Source: noSource{t}, Origins: []string{"https://x"}}
	if _, err := tr.RoundTrip(&http.Request{}); err == nil {
		t.Error("no error")
	}
}

func TestRoundTripAllocations(t *testing.T) {
	resp := &http.Response{StatusCode: 200, Body: http.NoBody}
	base := roundTripper(func(*http.Request) (*http.Response, error) { return resp, nil })
	tr := &Transport{Source: newSource(t, "https://x"), Base: base}
	req, _ := http.NewRequest("GET", "https://x/y", nil)
	for _, name := range []string{"Accept", "User-Agent", "Traceparent", "X-Request-Id", "Content-Type"} {
		req.Header.Set(name, "value")
	}
	if got := testing.AllocsPerRun(1000, func() { _, _ = tr.RoundTrip(req) }); got > 3 {
		t.Errorf("%v allocations, want 3", got)
	}
}

// FuzzOrigin checks who gets a token, whatever the URL: over TLS, and with the
// one listed host and port as net/http itself will see them.
func FuzzOrigin(f *testing.F) {
	for _, s := range []string{"https://api.example.com", "HTTPS://API.example.com:443/x", "http://api.example.com:443",
		"https://api.example.com@evil.example", "https://api.example.com:0443", "https://api.example.com:"} {
		f.Add(s)
	}
	o, err := parseOrigin("https://api.example.com")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := url.Parse(s)
		if err != nil || !o.is(u.Scheme, u.Host) {
			return
		}
		host, port := strings.ToLower(u.Hostname()), u.Port()
		if u.Scheme != "https" || host != "api.example.com" || port != "" && port != "443" {
			t.Errorf("a token goes to %q", s)
		}
	})
}
