package imdsfake_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aztoso/mitoken/imdsfake"
)

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
		get(t, fake, plain+"&object_id="+daemonObjectID)
		get(t, fake, "api-version=2018-02-01")
		if _, err := fake.RoundTrip(newRequestTo("GET", "http://x/nowhere")); err != nil {
			t.Fatal(err)
		}
		want := []imdsfake.Request{
			{Time: begin, Host: imdsfake.IMDS, Method: "GET", Path: "/metadata/identity/oauth2/token", Resource: resource,
				Identity: "object_id=" + daemonObjectID, UserAgent: "test", Status: 200, ClientID: daemonClientID, Reason: "a new token"},
			{Time: begin.Add(time.Minute), Host: imdsfake.IMDS, Method: "GET", Path: "/metadata/identity/oauth2/token", Resource: resource,
				Identity: "object_id=" + daemonObjectID, Status: 200, ClientID: daemonClientID, Reason: "the token of 1m0s ago"},
			{Time: begin.Add(time.Minute), Host: imdsfake.IMDS, Method: "GET", Path: "/metadata/identity/oauth2/token", Status: 400,
				Error: "invalid_request", Reason: `The required parameter "resource" is missing`},
			{Time: begin.Add(time.Minute), Method: "GET", Path: "/nowhere", Status: 404, Error: "not_found", Reason: "There is nothing at /nowhere"},
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

// WaitFor returns as soon as there is what it waits for, and no sooner.
func TestWaitFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newTenant(t)
		begin := time.Now()
		go func() {
			for range 5 {
				time.Sleep(time.Second)
				_, _ = fake.RoundTrip(newRequest(plain))
				_, _ = fake.RoundTrip(newRequest("api-version=2018-02-01"))
			}
		}()
		ok := func(r imdsfake.Request) bool { return r.Status == 200 }
		if got, err := fake.WaitFor(t.Context(), 3, ok); err != nil || len(got) != 3 || time.Since(begin) != 3*time.Second {
			t.Errorf("got %v, %v after %v", got, err, time.Since(begin))
		}
		if got, err := fake.WaitFor(t.Context(), 10, nil); err != nil || len(got) != 10 || time.Since(begin) != 5*time.Second {
			t.Errorf("got %v, %v after %v", got, err, time.Since(begin))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if got, err := fake.WaitFor(ctx, 6, ok); !errors.Is(err, context.DeadlineExceeded) || len(got) != 5 {
			t.Errorf("got %v, %v", got, err)
		}
	})
}

// Waiting in a bubble leaves nothing behind for those who are not in it.
func TestWaitForInABubble(t *testing.T) {
	fake := newTenant(t)
	synctest.Test(t, func(t *testing.T) {
		get(t, fake, plain)
		if _, err := fake.WaitFor(t.Context(), 1, nil); err != nil {
			t.Error(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := fake.WaitFor(ctx, 2, nil); err == nil {
			t.Error("there is a second request")
		}
	})
	get(t, fake, plain)
}

// Who has left before anything is sent is in no journal, and uses up no fault; who
// leaves later is in it as that.
func TestWhoLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newTenant(t)
		fake.Inject(imdsfake.Fault{Status: 503, Times: 1, Latency: time.Minute})
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := fake.RoundTrip(newRequest(plain).WithContext(gone)); !errors.Is(err, context.Canceled) || len(fake.Requests()) != 0 || len(fake.Faults()) != 1 {
			t.Errorf("got %v; the journal has %v", err, fake.Requests())
		}
		leaving, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := fake.RoundTrip(newRequest(plain).WithContext(leaving)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		if got := fake.Requests(); len(got) != 1 || got[0].Reason != "the client left" || got[0].Error != "" || got[0].Status != 0 {
			t.Errorf("the journal has %+v", got)
		}
		body, w := io.Pipe()
		defer w.Close()
		stuck, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		req := newRequestTo("POST", fake.Env(imdsfake.CloudShell, "http://x")["MSI_ENDPOINT"]).WithContext(stuck)
		req.Body = body
		if _, err := fake.RoundTrip(req); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a body that does not end: %v", err)
		}
	})
}

// A request that hangs is in the journal while it does.
func TestWaitForOneThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newTenant(t)
		fake.Inject(imdsfake.Fault{Failure: imdsfake.Hang})
		ctx, leave := context.WithCancel(t.Context())
		left := make(chan error)
		go func() {
			_, err := fake.RoundTrip(newRequest(plain).WithContext(ctx))
			left <- err
		}()
		got, err := fake.WaitFor(t.Context(), 1, nil)
		if err != nil || got[0].Error != "hang" || got[0].Status != 0 {
			t.Errorf("got %+v, %v", got, err)
		}
		leave()
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
}

// The journal and the tokens are kept within bounds.
func TestJournalForgets(t *testing.T) {
	fake := &imdsfake.Handler{Lifetime: time.Hour}
	fake.Inject(imdsfake.Fault{Status: 503, Times: 200_010})
	for range 200_010 {
		if _, err := fake.RoundTrip(newRequest(plain)); err != nil {
			t.Fatal(err)
		}
	}
	if got := len(fake.Requests()); got != 100_000 {
		t.Errorf("%d requests, want 100,000", got)
	}
	for i := range 2100 {
		get(t, fake, fmt.Sprint("api-version=2018-02-01&resource=", i))
	}
	tokens := fake.Tokens()
	if len(tokens) != 1000 || tokens[999].Resource != "2099" {
		t.Errorf("%d tokens, the last one for %s", len(tokens), tokens[len(tokens)-1].Resource)
	}
}

// Tokens are told of, and not given away.
func TestTokens(t *testing.T) {
	fake := newTenant(t)
	_, a := get(t, fake, plain+"&client_id="+daemonClientID)
	tokens := fake.Tokens()
	if len(tokens) != 1 || tokens[0].Resource != resource || tokens[0].ClientID != daemonClientID ||
		tokens[0].Expiry.Sub(tokens[0].Issued) != 24*time.Hour || fmt.Sprint(tokens[0].Claims["roles"]) != "[consumer]" {
		t.Errorf("got %+v", tokens)
	}
	text, err := json.Marshal(tokens)
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range strings.Split(a["access_token"], ".") {
		if strings.Contains(string(text), part) {
			t.Error("a part of the token is in it")
		}
	}
}
