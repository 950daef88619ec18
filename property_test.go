package mitoken

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestHistories plays random histories of an issuer, its callers and the clock,
// and compares what callers get with a model that has no concurrency: the token
// to be had is the one with the latest expiry of all that were issued.
func TestHistories(t *testing.T) {
	for seed := range uint64(300 / Stride) {
		synctest.Test(t, func(t *testing.T) {
			h := &history{rand: rand.New(rand.NewPCG(seed, 0)), t: t, seed: seed}
			h.play()
		})
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// A history is one run.
type history struct {
	t    *testing.T
	seed uint64
	rand *rand.Rand

	mu     sync.Mutex
	mode   string    // of the issuer
	under  int       // calls of the issuer
	calls  int       // so far
	last   time.Time // of the last one
	held   *token    // the model: what is to be had
	closed bool
	resets int // times that the model's expiry went back, for a challenge
}

func (h *history) source() string { return "history" }

// issue is the issuer. It knows what the schedule must never do.
func (h *history) issue(ctx context.Context, _ string, r round) (*token, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	h.under++
	defer func() { h.under-- }()
	switch gap := now.Sub(h.last); {
	case h.under > 1:
		h.t.Errorf("seed %d: two flights at once", h.seed)
	case h.closed:
		h.t.Errorf("seed %d: asked after Close", h.seed)
	case r.claims == "" && h.held != nil && h.held.expiry.After(now) && gap < 500*time.Millisecond:
		h.t.Errorf("seed %d: asked again after %v, with a token in hand", h.seed, gap)
	}
	h.calls++
	h.last = now
	lifetime := []time.Duration{day, time.Hour, 5 * time.Minute, 10 * time.Second}[h.rand.IntN(4)]
	tok := newToken(h.calls, lifetime)
	switch h.mode {
	case "slow":
		h.sleep(ctx, time.Duration(h.rand.Int64N(int64(time.Minute))))
	case "same":
		if h.held != nil {
			tok = h.held
		}
	case "older":
		tok.notBefore, tok.expiry = now.Add(-lifetime), now.Add(lifetime/10)
	case "expired":
		tok.expiry = now.Add(-time.Second)
	case "fail":
		return nil, errOutage
	case "hang":
		h.sleep(ctx, day)
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	// A token that is about to expire is no use.
	usable := time.Until(tok.expiry) >= time.Second
	if newer := h.held == nil || tok.expiry.After(h.held.expiry); usable && (newer || r.claims != "") {
		h.held = tok
		if !newer {
			h.resets++
		}
	}
	return tok, nil
}

// sleep lets others go on for a time.
func (h *history) sleep(ctx context.Context, d time.Duration) {
	h.mu.Unlock()
	defer h.mu.Lock()
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

func (h *history) play() {
	modes := []string{"new", "new", "slow", "same", "older", "expired", "fail", "fail", "hang"}
	c := newCache(h, systemClock{}, nil, nil)
	e := c.add("r")
	var callers sync.WaitGroup
	for range 60 {
		h.mu.Lock()
		if h.rand.IntN(3) == 0 {
			h.mode = modes[h.rand.IntN(len(modes))]
		}
		pause := time.Duration(h.rand.ExpFloat64() * float64([]time.Duration{time.Second, time.Minute, 3 * time.Hour}[h.rand.IntN(3)]))
		n, patience := h.rand.IntN(4), time.Duration(h.rand.Int64N(int64(time.Minute)))
		claims := ""
		if h.rand.IntN(10) == 0 {
			claims = fmt.Sprint(h.rand.IntN(3))
		}
		h.mu.Unlock()
		for range n {
			callers.Go(func() { h.call(e, patience, claims) })
		}
		time.Sleep(pause)
		synctest.Wait()
	}
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	c.close()
	callers.Wait()
	time.Sleep(2 * day)
}

// call is one caller.
func (h *history) call(e *entry, patience time.Duration, claims string) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	h.mu.Lock()
	now, want, resets := time.Now(), h.held, h.resets
	h.mu.Unlock()
	var got *held
	var err error
	if claims == "" {
		got, err = e.get(ctx)
	} else {
		got, err = e.renew(ctx, claims)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	after := time.Now()
	if waited := after.Sub(now); waited > patience {
		h.t.Errorf("seed %d: waited %v with the patience of %v", h.seed, waited, patience)
	}
	valid := want != nil && want.expiry.After(now)
	switch {
	case err != nil && valid && claims == "" && !errors.Is(err, ErrClosed):
		h.t.Errorf("seed %d: got %v with a token in hand", h.seed, err)
	case err != nil:
		return
	case valid && claims == "" && after.After(now):
		h.t.Errorf("seed %d: waited %v with a token in hand", h.seed, after.Sub(now))
	case !got.expiry.After(after):
		h.t.Errorf("seed %d: got a token that expired %v ago", h.seed, after.Sub(got.expiry))
	case valid && got.expiry.Before(want.expiry) && h.resets == resets:
		h.t.Errorf("seed %d: the expiry went back by %v", h.seed, want.expiry.Sub(got.expiry))
	case h.held == nil || got.expiry.After(h.held.expiry) && h.resets == resets:
		h.t.Errorf("seed %d: got a token that was not issued", h.seed)
	}
}
