package imdsfake_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aztoso/mitoken/imdsfake"
)

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
		{"status", imdsfake.Fault{Status: 503}, 503, `"error":"unknown"`, nil, "unknown"},
		{"upgrade", imdsfake.Fault{Status: 410}, 410, "IMDS is going through updates", nil, "gone"},
		{"updating", imdsfake.Fault{Status: 404}, 404, "IMDS endpoint is updating", nil, "not_found"},
		{"wrong request", imdsfake.Fault{Status: 400}, 400, `"error":"invalid_request"`, nil, "invalid_request"},
		{"body", imdsfake.Fault{Status: 200, Body: "<html>"}, 200, "<html>", nil, ""},
		{"Retry-After", imdsfake.Fault{Status: 429, RetryAfter: "7"}, 429, `"error":"too_many_requests"`, nil, "too_many_requests"},
		{"refuse", imdsfake.Fault{Failure: imdsfake.Refuse}, 0, "",
			func(err error) bool { return errors.Is(err, syscall.ECONNREFUSED) }, "refuse"},
		{"reset", imdsfake.Fault{Failure: imdsfake.Reset}, 0, "", reset, "reset"},
		{"truncate", imdsfake.Fault{Failure: imdsfake.Truncate}, 0, "",
			func(err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) }, "truncate"},
		{"truncate at once", imdsfake.Fault{Failure: imdsfake.Truncate, After: -1}, 0, "",
			func(err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) }, "truncate"},
		{"truncate at the end", imdsfake.Fault{Failure: imdsfake.Truncate, Body: "abc", After: 2}, 0, "ab",
			func(err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) }, "truncate"},
		{"reset in the body", imdsfake.Fault{Failure: imdsfake.ResetBody}, 0, "", reset, "reset-body"},
		{"wrong type", imdsfake.Fault{Header: map[string]string{"Content-Type": "text/html", "Server": ""}}, 200, `"access_token"`, nil, ""},
		{"no type", imdsfake.Fault{Header: map[string]string{"content-type": ""}}, 200, `"access_token"`, nil, ""},
		{"fields", imdsfake.Fault{Fields: map[string]any{"token_type": "mac", "expires_on": 7, "resource": nil}}, 200,
			`"expires_in":"86400","expires_on":7,"ext_expires_in":"86400"`, nil, ""},
		{"fields of no object", imdsfake.Fault{Status: 200, Body: "[]", Fields: map[string]any{"a": 1}}, 200, "[]", nil, ""},
		{"too large", imdsfake.Fault{Pad: 1 << 20}, 200, strings.Repeat(" ", 1<<20), nil, ""},
		{"slow", imdsfake.Fault{Body: "abc", Drip: time.Millisecond}, 200, "abc", nil, ""},
		{"random", imdsfake.Fault{Jitter: time.Millisecond}, 200, `"access_token"`, nil, ""},
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
				t.Errorf("got %s, %d bytes: %.300s", resp.Status, resp.ContentLength, body)
			default:
				for name, value := range tc.fault.Header {
					if resp.Header.Get(name) != value {
						t.Errorf("%s is %q, want %q", name, resp.Header.Get(name), value)
					}
				}
			}
			if resp, _ := get(t, rt, plain); resp.StatusCode != 200 {
				t.Errorf("the next request got %s", resp.Status)
			}
		}
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := newTenant(t)
				try(t, fake, fake)
				got := fake.Requests()[0]
				if tc.name != "hang" && got.Error != tc.error || got.Resource != resource ||
					tc.status != 0 && got.Status != tc.status {
					t.Errorf("the journal has %+v", got)
				}
				garbled := len(tc.fault.Header) > 0 || tc.fault.Fields != nil || tc.fault.Pad > 0 || tc.fault.Body != ""
				if tc.status == 200 && tc.fault.Status == 0 && strings.Contains(got.Reason, "garbled") != garbled {
					t.Errorf("the journal does not say how it was answered: %+v", got)
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

// A compressed body that nobody asked for is left to the client.
func TestGzip(t *testing.T) {
	fake := newTenant(t)
	fake.Inject(imdsfake.Fault{Gzip: true})
	resp, err := fake.RoundTrip(newRequest(plain))
	if err != nil {
		t.Fatal(err)
	}
	r, err := gzip.NewReader(resp.Body)
	if err != nil || resp.Header.Get("Content-Encoding") != "gzip" {
		t.Fatal(err, resp.Header)
	}
	if body, err := io.ReadAll(r); err != nil || !bytes.Contains(body, []byte(`"access_token"`)) {
		t.Errorf("got %s, %v", body, err)
	}
}

// Latency is random between two bounds, and a drip takes its time for each byte.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newTenant(t)
		fake.Inject(imdsfake.Fault{Latency: time.Second, Jitter: time.Second})
		seen := map[time.Duration]bool{}
		for range 100 {
			begin := time.Now()
			get(t, fake, plain)
			took := time.Since(begin)
			if took < time.Second || took >= 2*time.Second {
				t.Fatalf("took %v", took)
			}
			seen[took] = true
		}
		if len(seen) < 90 {
			t.Errorf("%d waits of 100 differ", len(seen))
		}
		fake.Clear()
		fake.Inject(imdsfake.Fault{Body: "0123456789", Drip: time.Second})
		begin := time.Now()
		resp, err := fake.RoundTrip(newRequest(plain))
		if err != nil || time.Since(begin) > 0 {
			t.Fatal(err, time.Since(begin))
		}
		if body, err := io.ReadAll(resp.Body); string(body) != "0123456789" || err != nil || time.Since(begin) < 10*time.Second {
			t.Errorf("got %s, %v after %v", body, err, time.Since(begin))
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		resp, err = fake.RoundTrip(newRequest(plain).WithContext(ctx))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(resp.Body); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the deadline", err)
		}
	})
}

// A fault can be for one identity, or for one resource, by any of their names.
func TestFaultsHaveScopes(t *testing.T) {
	const daemon = "&client_id=" + daemonClientID
	app := "api-version=2018-02-01&resource=a0000000-0000-4000-8000-000000000001"
	for _, tc := range []struct {
		name  string
		fault imdsfake.Fault
		want  []int // of: the host at myapp, the daemon there, the daemon there by its client ID, the host at graph
	}{
		{"all", imdsfake.Fault{}, []int{503, 503, 503, 503}},
		{"a name", imdsfake.Fault{Identity: "daemon"}, []int{200, 503, 503, 200}},
		{"an object ID", imdsfake.Fault{Identity: strings.ToUpper(daemonObjectID)}, []int{200, 503, 503, 200}},
		{"the default one", imdsfake.Fault{Identity: "host"}, []int{503, 200, 200, 503}},
		{"nobody", imdsfake.Fault{Identity: "x"}, []int{200, 200, 200, 200}},
		{"a resource", imdsfake.Fault{Resource: resource}, []int{503, 503, 503, 200}},
		{"its client ID", imdsfake.Fault{Resource: "a0000000-0000-4000-8000-000000000001"}, []int{503, 503, 503, 200}},
		{"both", imdsfake.Fault{Resource: resource + "/", Identity: "host"}, []int{503, 200, 200, 200}},
		{"an unknown resource", imdsfake.Fault{Resource: "https://other"}, []int{200, 200, 200, 200}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fake := newTenant(t)
			tc.fault.Status = 503
			fake.Inject(tc.fault)
			var got []int
			for _, query := range []string{plain, plain + daemon, app + daemon, "api-version=2018-02-01&resource=https://graph.microsoft.com"} {
				resp, _ := get(t, fake, query)
				got = append(got, resp.StatusCode)
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("got %v, want %v", got, tc.want)
			}
		})
	}
	fake := newTenant(t)
	fake.Inject(imdsfake.Fault{Status: 503, Identity: "host", Times: 1})
	resp, err := fake.RoundTrip(newRequestTo("GET", "http://x/metadata/instance?api-version=2021-02-01"))
	if err != nil || resp.StatusCode != 200 {
		t.Errorf("the document is nobody's: %v %v", resp, err)
	}
}

func TestProbability(t *testing.T) {
	srv := imdsfake.NewServer(nil)
	defer srv.Close()
	for _, fake := range []struct {
		name string
		http.RoundTripper
	}{{"in memory", srv.Handler}, {"on a port", srv.Client().Transport}} {
		srv.Handler.Clear()
		srv.Handler.Inject(
			imdsfake.Fault{Failure: imdsfake.Refuse, Probability: 0.25},
			imdsfake.Fault{Status: 503, Probability: 1. / 3},
		)
		refused, failed := 0, 0
		const n = 2000
		for range n {
			resp, err := fake.RoundTrip(newRequest(plain))
			if errors.Is(err, syscall.ECONNREFUSED) {
				refused++
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode == 503 {
				failed++
			}
			_, _ = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		// A quarter each, with a standard deviation of 19.
		if refused < 400 || refused > 600 || failed < 400 || failed > 600 {
			t.Errorf("%s: %d refused and %d failed of %d, want a quarter each", fake.name, refused, failed, n)
		}
	}
}

// Faults tells what is left of the script.
func TestFaultsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newTenant(t)
		fake.Inject(imdsfake.Fault{Status: 410, Times: 2}, imdsfake.Fault{Status: 503, For: time.Hour}, imdsfake.Fault{Latency: 1})
		get(t, fake, plain)
		time.Sleep(10 * time.Minute)
		got := fmt.Sprint(fake.Faults())
		want := fmt.Sprint([]imdsfake.Fault{{Status: 410, Times: 1}, {Status: 503, For: 50 * time.Minute}, {Latency: 1}})
		if got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		get(t, fake, plain)
		time.Sleep(time.Hour)
		if got := fake.Faults(); len(got) != 1 || got[0].Latency != 1 {
			t.Errorf("got %v, want the one that has no end", got)
		}
	})
}

func TestFaultsThatMakeNoSense(t *testing.T) {
	for want, f := range map[string]imdsfake.Fault{
		"times: -1":           {Times: -1},
		"for: -1ns":           {For: -1},
		"probability: 1.5":    {Probability: 1.5},
		"latency: -1ns":       {Latency: -1},
		"jitter: -1ns":        {Jitter: -1},
		"drip: -1ns":          {Drip: -1},
		"pad: -1":             {Pad: -1},
		"status: 99":          {Status: 99},
		"fields: json: uns":   {Fields: map[string]any{"a": math.NaN()}},
		"it has no effect":    {Times: 1},
		"header: content-len": {Header: map[string]string{"content-length": "1"}},
		`failure: "explode"`:  {Failure: "explode"},
	} {
		if err := f.Check(); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
		func() {
			defer func() {
				if p := fmt.Sprint(recover()); !strings.Contains(p, "imdsfake: fault: "+want) {
					t.Errorf("panic %q, want %s", p, want)
				}
			}()
			new(imdsfake.Handler).Inject(imdsfake.Fault{Status: 503}, f)
		}()
	}
}

// A fault for a resource is for requests that name it, also where every resource is
// known.
func TestResourceScopeOfAnOpenTenant(t *testing.T) {
	fake := new(imdsfake.Handler)
	fake.Inject(imdsfake.Fault{Status: 503, Resource: "api://a"})
	for query, want := range map[string]int{"&resource=api://a": 503, "&resource=api://b": 200, "": 400} {
		if resp, _ := get(t, fake, "api-version=2018-02-01"+query); resp.StatusCode != want {
			t.Errorf("%q: got %s, want %d", query, resp.Status, want)
		}
	}
}

// A connection that is reset is that, be it a kept one: net/http sends the request
// again by itself, and meets the same fault. It is one request in the journal.
func TestResetOfAKeptConnection(t *testing.T) {
	srv := imdsfake.NewServer(nil)
	defer srv.Close()
	get(t, srv.Client().Transport, plain)
	srv.Handler.Inject(imdsfake.Fault{Failure: imdsfake.Reset, Times: 1})
	if resp, err := srv.Client().Transport.RoundTrip(newRequest(plain)); err == nil {
		resp.Body.Close()
		t.Errorf("got %s", resp.Status)
	}
	if got := srv.Handler.Requests(); len(got) != 2 || got[1].Error != "reset" {
		t.Errorf("the journal has %+v", got)
	}
	get(t, srv.Client().Transport, plain)
}

// A request that is one too many has no fault: the next one has it.
func TestLimitsComeBeforeFaults(t *testing.T) {
	srv := imdsfake.NewServer(&imdsfake.Handler{Limits: imdsfake.Limits{AtOnce: 1}})
	defer srv.Close()
	hanging, cancel := context.WithCancel(t.Context())
	srv.Handler.Inject(imdsfake.Fault{Failure: imdsfake.Hang, Times: 1}, imdsfake.Fault{Status: 410, Times: 1})
	left := make(chan bool)
	go func() {
		defer close(left)
		_, _ = srv.Client().Transport.RoundTrip(newRequest(plain).WithContext(hanging))
	}()
	if _, err := srv.Handler.WaitFor(t.Context(), 1, nil); err != nil {
		t.Fatal(err)
	}
	for _, rt := range []http.RoundTripper{srv.Handler, srv.Client().Transport} {
		if resp, _ := get(t, rt, plain); resp.StatusCode != 429 {
			t.Errorf("one too many: %s", resp.Status)
		}
	}
	if got := srv.Handler.Faults(); len(got) != 1 || got[0].Status != 410 || got[0].Times != 1 {
		t.Errorf("left are %v", got)
	}
	cancel()
	<-left
}

// In memory and on a port, the same comes of it.
func TestMemoryAndPortAgree(t *testing.T) {
	srv := imdsfake.NewServer(nil)
	defer srv.Close()
	for _, tc := range []struct {
		name   string
		method string
		fault  imdsfake.Fault
		body   string
		fails  bool
	}{
		{"more than there is", "GET", imdsfake.Fault{Body: "abc", Failure: imdsfake.Truncate, After: 100}, "ab", true},
		{"HEAD", "HEAD", imdsfake.Fault{Status: 503}, "", false},
		{"no content", "GET", imdsfake.Fault{Status: 204}, "", false},
	} {
		for name, rt := range map[string]http.RoundTripper{"in memory": srv.Handler, "on a port": srv.Client().Transport} {
			srv.Handler.Clear()
			srv.Handler.Inject(tc.fault)
			req := newRequest(plain)
			req.Method = tc.method
			resp, err := rt.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if string(body) != tc.body || (err != nil) != tc.fails {
				t.Errorf("%s, %s: got %q, %v", tc.name, name, body, err)
			}
		}
	}
	for _, rt := range []http.RoundTripper{srv.Handler, srv.Client().Transport} {
		srv.Handler.Clear()
		srv.Handler.Inject(imdsfake.Fault{Gzip: true})
		resp, err := rt.RoundTrip(newRequest(plain))
		if err != nil {
			t.Fatal(err)
		}
		if body, _ := io.ReadAll(resp.Body); resp.Header.Get("Content-Encoding") != "gzip" || bytes.Contains(body, []byte("access_token")) {
			t.Errorf("it is not compressed: %s", body)
		}
		resp.Body.Close()
		if _, err := rt.RoundTrip(&http.Request{Method: "GET"}); err == nil {
			t.Error("a request without a URL has an answer")
		}
	}
}
