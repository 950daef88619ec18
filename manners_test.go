package mitoken

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aztoso/mitoken/imdsfake"
	"github.com/hashicorp/go-retryablehttp"
)

// The manners of a RoundTripper, over real connections.

// newService is one over TLS, with HTTP/2 if it is to have it, and a client of it
// with tokens.
func newService(t *testing.T, http2 bool, h http.HandlerFunc) (*httptest.Server, *http.Client) {
	t.Helper()
	srv := httptest.NewUnstartedServer(h)
	srv.EnableHTTP2 = http2
	srv.StartTLS()
	t.Cleanup(srv.Close)
	cred := &Credential{IMDSTransport: &imdsfake.Handler{Cache: imdsfake.NoCache}}
	t.Cleanup(func() { cred.Close() })
	base := srv.Client().Transport.(*http.Transport)
	base.ExpectContinueTimeout = 10 * time.Second
	client := &http.Client{Transport: &Transport{Source: cred.TokenSource("r"), Base: base, Origins: []string{srv.URL}}}
	t.Cleanup(client.CloseIdleConnections)
	return srv, client
}

// Over HTTP/2, a body streams both ways at once: an answer to each line before the
// next one is sent.
func TestStreams(t *testing.T) {
	srv, client := newService(t, true, func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor != 2 || !strings.HasPrefix(r.Header.Get("Authorization"), "Bearer ") {
			t.Errorf("got %s with %d characters of a token", r.Proto, len(r.Header.Get("Authorization")))
		}
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush()
		for lines := bufio.NewScanner(r.Body); lines.Scan(); {
			fmt.Fprintf(w, "you said %s\n", lines.Text())
			_ = http.NewResponseController(w).Flush()
		}
	})
	out, in := io.Pipe()
	resp, err := client.Post(srv.URL, "text/plain", out)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	answers := bufio.NewScanner(resp.Body)
	for i := range 10 {
		fmt.Fprintf(in, "%d\n", i)
		if want := fmt.Sprint("you said ", i); !answers.Scan() || answers.Text() != want {
			t.Fatalf("got %q, want %q", answers.Text(), want)
		}
	}
	in.Close()
	if answers.Scan() {
		t.Errorf("it goes on: %s", answers.Text())
	}
}

// With Expect: 100-continue, a body is not sent with a token that is refused.
func TestExpectContinue(t *testing.T) {
	var asked atomic.Int64
	srv, client := newService(t, false, func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) == 1 {
			w.Header().Set("WWW-Authenticate", `Bearer error="invalid_token"`)
			w.WriteHeader(http.StatusUnauthorized) // before it reads
			return
		}
		body, err := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%d bytes, %v", len(body), err)
	})
	var read atomic.Int64
	newBody := func() io.ReadCloser {
		return io.NopCloser(io.TeeReader(strings.NewReader(strings.Repeat("x", 1<<20)), counter{&read}))
	}
	req := must(http.NewRequest(http.MethodPut, srv.URL, newBody()))
	req.ContentLength = 1 << 20
	req.GetBody = func() (io.ReadCloser, error) { return newBody(), nil }
	req.Header.Set("Expect", "100-continue")
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, _ := io.ReadAll(resp.Body); resp.StatusCode != 200 || string(body) != "1048576 bytes, <nil>" || asked.Load() != 2 {
		t.Errorf("got %s %s after %d requests", resp.Status, body, asked.Load())
	}
	if read.Load() != 1<<20 {
		t.Errorf("%d bytes of the body were read, want them once", read.Load())
	}
}

type counter struct{ n *atomic.Int64 }

func (c counter) Write(b []byte) (int, error) { c.n.Add(int64(len(b))); return len(b), nil }

// Idle connections of Base are closed through it.
func TestCloseIdleConnections(t *testing.T) {
	closed := 0
	tr := &Transport{Base: idle{&closed}}
	(&http.Client{Transport: tr}).CloseIdleConnections()
	if closed != 1 {
		t.Errorf("closed %d times", closed)
	}
	(&Transport{Base: roundTripper(nil)}).CloseIdleConnections() // which has none
}

type idle struct{ closed *int }

func (i idle) CloseIdleConnections()                         { *i.closed++ }
func (idle) RoundTrip(*http.Request) (*http.Response, error) { return nil, errors.New("idle") }

// It goes above and below a client that retries.
func TestWithRetryablehttp(t *testing.T) {
	var asked atomic.Int64
	flaky := func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") == "" {
			t.Error("a try has no token")
		}
		body, _ := io.ReadAll(r.Body)
		if asked.Add(1)%3 != 0 {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write(body)
	}
	srv, client := newService(t, false, flaky)
	quick := func(base *http.Client) *retryablehttp.Client {
		return &retryablehttp.Client{HTTPClient: base, RetryWaitMin: time.Millisecond, RetryWaitMax: time.Millisecond, RetryMax: 5,
			CheckRetry: retryablehttp.DefaultRetryPolicy, Backoff: retryablehttp.DefaultBackoff}
	}
	tr := client.Transport.(*Transport)
	below := *client
	above := &http.Client{Transport: &Transport{Source: tr.Source, Origins: tr.Origins,
		Base: &retryablehttp.RoundTripper{Client: quick(&http.Client{Transport: tr.Base})}}}
	for name, c := range map[string]*http.Client{"below": quick(&below).StandardClient(), "above": above} {
		resp, err := c.Post(srv.URL, "text/plain", strings.NewReader("body"))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != 200 || string(body) != "body" {
			t.Errorf("%s: got %s %s", name, resp.Status, body)
		}
	}
}
