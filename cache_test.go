package mitoken

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
)

// A scripted issuer answers as its script says. Its zero value issues a new
// token for 24 hours at once.
type scripted struct {
	answer  func(ctx context.Context, call int, r round) (*token, error)
	latency time.Duration

	mu     sync.Mutex
	rounds []round     // of the calls so far
	times  []time.Time // and when they came
}

func (s *scripted) source() string { return "script" }

func (s *scripted) issue(ctx context.Context, _ string, r round) (*token, error) {
	s.mu.Lock()
	call := len(s.rounds)
	s.rounds, s.times = append(s.rounds, r), append(s.times, time.Now())
	s.mu.Unlock()
	if s.latency > 0 {
		select {
		case <-time.After(s.latency):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if s.answer == nil {
		return newToken(call, day), nil
	}
	return s.answer(ctx, call, r)
}

func (s *scripted) calls() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.rounds)
}

// newToken returns a token issued now, the n-th.
func newToken(n int, lifetime time.Duration) *token {
	now := time.Now()
	return &token{value: fmt.Sprint("token", n), notBefore: now, expiry: now.Add(lifetime)}
}

var errOutage = errors.New("outage")

// outage is an answer that fails from one time to another.
func outage(from, to time.Time) func(context.Context, int, round) (*token, error) {
	return func(_ context.Context, call int, _ round) (*token, error) {
		if now := time.Now(); !now.Before(from) && now.Before(to) {
			return nil, errOutage
		}
		return newToken(call, day), nil
	}
}

// newEntry returns the entry of a cache over an issuer, closed with the test.
func newEntry(t *testing.T, i issuer) *entry {
	return newSkewedEntry(t, i, systemClock{}, nil)
}

func newSkewedEntry(t *testing.T, i issuer, clock clock, observe func(Event)) *entry {
	c := newCache(i, clock, nil, observe)
	t.Cleanup(c.close)
	return c.add("https://service")
}

// mustGet returns the value of a token that is to be had without waiting.
func mustGet(t *testing.T, e *entry) string {
	t.Helper()
	begin := time.Now()
	h, err := e.get(t.Context())
	if err != nil {
		t.Fatalf("after %v: %v", time.Since(begin), err)
	}
	if waited := time.Since(begin); waited > 0 {
		t.Fatalf("waited %v", waited)
	}
	if left := time.Until(h.expiry); left <= 0 {
		t.Fatalf("got a token that expired %v ago", -left)
	}
	return h.oauth2.AccessToken
}

func TestOneFlightForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &scripted{latency: 50 * time.Millisecond}
		e := newEntry(t, i)
		begin := time.Now()
		var wg sync.WaitGroup
		for range 10_000 {
			wg.Go(func() {
				if h, err := e.get(t.Context()); err != nil || h.oauth2.AccessToken != "token0" {
					t.Errorf("got %v, %v", h, err)
				}
			})
		}
		wg.Wait()
		if got := i.calls(); got != 1 {
			t.Errorf("%d requests, want 1", got)
		}
		if got := time.Since(begin); got != i.latency {
			t.Errorf("took %v, want %v", got, i.latency)
		}
	})
}

func TestFailureIsSharedAndHeld(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &scripted{latency: 50 * time.Millisecond}
		i.answer = func(context.Context, int, round) (*token, error) { return nil, errOutage }
		e := newEntry(t, i)
		var wg sync.WaitGroup
		for range 200 {
			wg.Go(func() {
				if _, err := e.get(t.Context()); !errors.Is(err, errOutage) {
					t.Errorf("got %v, want the outage", err)
				}
			})
		}
		wg.Wait()
		// In a second 100 callers more: not one gets through.
		for range 100 {
			time.Sleep(9 * time.Millisecond)
			if _, err := e.get(t.Context()); !errors.Is(err, errOutage) {
				t.Errorf("got %v, want the outage", err)
			}
		}
		if got := i.calls(); got != 1 {
			t.Errorf("%d requests, want 1", got)
		}
		time.Sleep(5 * time.Second)
		_, _ = e.get(t.Context())
		if got := i.calls(); got != 2 {
			t.Errorf("%d requests after 5 s, want 2", got)
		}
		// Nobody has a token to keep fresh.
		time.Sleep(day)
		if got := i.calls(); got != 2 {
			t.Errorf("%d requests after a day without callers, want 2", got)
		}
	})
}

func TestCallersLeaveTheFlightGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &scripted{latency: time.Minute}
		e := newEntry(t, i)
		var wg sync.WaitGroup
		for n := 1; n <= 30; n++ {
			wg.Go(func() {
				patience := time.Duration(n) * time.Second
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				begin := time.Now()
				_, err := e.get(ctx)
				if !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("got %v, want the deadline", err)
				}
				if got := time.Since(begin); got != patience {
					t.Errorf("came back after %v, want %v", got, patience)
				}
			})
		}
		wg.Wait()
		time.Sleep(time.Minute)
		mustGet(t, e)
		if got := i.calls(); got != 1 {
			t.Errorf("%d requests, want 1", got)
		}
	})
}

func TestLeavingCallerLearnsWhy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &scripted{}
		i.answer = func(ctx context.Context, _ int, r round) (*token, error) {
			r.failed(errOutage)
			<-ctx.Done()
			return nil, ctx.Err()
		}
		e := newEntry(t, i)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := e.get(ctx)
		if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, errOutage) {
			t.Errorf("got %v, want the deadline and the outage", err)
		}
		cause := errors.New("enough")
		ctx, cancel = context.WithTimeoutCause(t.Context(), time.Second, cause)
		defer cancel()
		_, err = e.get(ctx)
		if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, cause) || !strings.Contains(err.Error(), "enough") {
			t.Errorf("got %v, want the deadline and its cause", err)
		}
		// The flight has an end of its own, which looks like nobody's deadline.
		_, err = e.get(t.Context())
		if err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want an error that is not a caller's deadline", err)
		}
	})
}

func TestIdleSourceIsRefreshed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &scripted{}
		e := newEntry(t, i)
		_, _ = e.get(t.Context())
		time.Sleep(30 * day)
		// Every 40 to 50 % of a day.
		if got := i.calls(); got < 60 || got > 76 {
			t.Errorf("%d requests in 30 days, want 60 to 76", got)
		}
		mustGet(t, e)
		for n, r := range i.rounds[1:] {
			if !r.renew() || r.patient {
				t.Fatalf("round %d is %+v, want a renewal without patience", n+1, r)
			}
			if gap := i.times[n+1].Sub(i.times[n]); gap < day*4/10 || gap > day/2 {
				t.Fatalf("round %d came after %v, want 40 to 50 %% of a day", n+1, gap)
			}
		}
	})
}

func TestNobodyWaitsForARefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &scripted{}
		i.answer = func(ctx context.Context, call int, _ round) (*token, error) {
			if call > 0 {
				<-ctx.Done() // hangs
				return nil, ctx.Err()
			}
			return newToken(call, day), nil
		}
		e := newEntry(t, i)
		_, _ = e.get(t.Context())
		for range 24*60 - 1 {
			time.Sleep(time.Minute)
			mustGet(t, e)
		}
	})
}

// TestOutages starts an outage at every quarter of an hour of a day. None of up
// to 12 hours is felt; a longer one is from the expiry of the token in hand on,
// and no longer than half a minute after its end.
func TestOutages(t *testing.T) {
	for _, length := range []time.Duration{time.Minute, 6 * time.Hour, 12 * time.Hour, 25 * time.Hour} {
		t.Run(length.String(), func(t *testing.T) {
			for start := 15 * time.Minute; start <= day; start += 15 * time.Minute {
				synctest.Test(t, func(t *testing.T) { testOutage(t, start, length) })
			}
		})
	}
}

func testOutage(t *testing.T, start, length time.Duration) {
	from := time.Now().Add(start)
	to := from.Add(length)
	e := newEntry(t, &scripted{answer: outage(from, to)})
	var expiry, first, last time.Time // of the token in hand; of the failures
	const every = 30 * time.Second
	for end := to.Add(time.Hour); time.Now().Before(end); time.Sleep(every) {
		begin := time.Now()
		h, err := e.get(t.Context())
		switch {
		case time.Since(begin) > 0:
			t.Fatalf("start %v: waited %v", start, time.Since(begin))
		case err == nil && !time.Now().Before(h.expiry):
			t.Fatalf("start %v: got an expired token", start)
		case err == nil && first.IsZero():
			expiry = h.expiry
		case err != nil && first.IsZero():
			first = time.Now()
		}
		if err != nil {
			last = time.Now()
		}
	}
	if length <= day/2 {
		if !first.IsZero() {
			t.Fatalf("start %v: callers failed from %v on", start, first.Sub(from))
		}
		return
	}
	if got := first.Sub(expiry); got < 0 || got >= every {
		t.Fatalf("start %v: the first failure came %v after the token's expiry", start, got)
	}
	if got := last.Sub(to); got > 30*time.Second {
		t.Fatalf("start %v: the last failure came %v after the outage", start, got)
	}
}

func TestFailuresBackOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		i := &scripted{answer: outage(begin.Add(time.Hour), begin.Add(10*day))}
		e := newEntry(t, i)
		_, _ = e.get(t.Context())
		time.Sleep(day - time.Second)
		// From 9:36 or 12:00 to 24:00: seldom at first and last, but never never.
		if got := i.calls(); got < 60 || got > 200 {
			t.Errorf("%d requests in the outage until the token expires, want 60 to 200", got)
		}
		for n := 2; n < i.calls(); n++ {
			if gap := i.times[n].Sub(i.times[n-1]); gap < 15*time.Second || gap > 15*time.Minute {
				t.Errorf("request %d came %v after the one before", n, gap)
			}
		}
		before := i.calls()
		time.Sleep(time.Hour)
		if got := i.calls() - before; got < 120 || got > 241 {
			t.Errorf("%d requests in the hour after, want one every 15 to 30 s", got)
		}
	})
}

func TestExpiredTokenFailsFast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		i := &scripted{answer: outage(begin.Add(time.Hour), begin.Add(30*time.Hour))}
		e := newEntry(t, i)
		_, _ = e.get(t.Context())
		time.Sleep(day - time.Nanosecond)
		mustGet(t, e)
		time.Sleep(time.Nanosecond)
		i.latency = time.Second
		slow := 0
		for range 3600 {
			begin := time.Now()
			if _, err := e.get(t.Context()); !errors.Is(err, errOutage) {
				t.Fatalf("got %v, want the outage", err)
			}
			if time.Since(begin) > 0 {
				slow++
			}
			time.Sleep(time.Second)
		}
		if slow > 600 { // those who came during a try
			t.Errorf("%d of 3600 callers waited", slow)
		}
		time.Sleep(6 * time.Hour) // nobody asks while the outage ends
		mustGet(t, e)
	})
}

func TestSameTokenIsNoFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		first := newToken(0, day)
		i := &scripted{}
		i.answer = func(_ context.Context, call int, _ round) (*token, error) {
			if time.Since(begin) < day {
				return first, nil // as long as it is any good
			}
			return newToken(call, day), nil
		}
		e := newEntry(t, i)
		_, _ = e.get(t.Context())
		time.Sleep(23 * time.Hour)
		if s := e.status(); s.State != "due" || s.Failures != 0 || s.LastError != "" {
			t.Errorf("status is %+v, want due and no failure", s)
		}
		mustGet(t, e)
		if got := i.calls(); got > 75 {
			t.Errorf("%d requests, want few", got)
		}
		time.Sleep(time.Hour)
		// A new one is there as soon as the old one has expired.
		if got := mustGet(t, e); got == "token0" {
			t.Errorf("got %s, which has expired", got)
		}
	})
}

// IMDS may have nothing newer until half the lifetime is over. It is asked then.
func TestRefreshAtHalfAtTheLatest(t *testing.T) {
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			var issued *token
			i := &scripted{}
			i.answer = func(_ context.Context, call int, _ round) (*token, error) {
				if issued == nil || time.Until(issued.expiry) <= day/2 {
					issued = newToken(call, day)
				}
				return issued, nil
			}
			e := newEntry(t, i)
			_, _ = e.get(t.Context())
			for range 3 * 24 * 60 {
				time.Sleep(time.Minute)
				mustGet(t, e)
				if got := e.status().Survives; got < day/2 {
					t.Fatalf("survives %v, want half a day at least", got)
				}
			}
		})
	}
}

func TestOlderTokenIsNotTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &scripted{}
		i.answer = func(_ context.Context, call int, _ round) (*token, error) {
			tok := newToken(call, day)
			if call%2 == 1 { // from another, older cache
				tok.expiry = tok.expiry.Add(-20 * time.Hour)
			}
			return tok, nil
		}
		e := newEntry(t, i)
		_, _ = e.get(t.Context())
		var last time.Time
		for range 7 * 24 {
			time.Sleep(time.Hour)
			mustGet(t, e)
			if got := e.status().Expiry; got.Before(last) {
				t.Fatalf("the expiry went back from %v to %v", last, got)
			} else {
				last = got
			}
		}
	})
}

func TestLifetimes(t *testing.T) {
	for _, tc := range []struct {
		name     string
		tok      func() *token
		year     int // requests at most
		duration time.Duration
	}{
		{"24 h", func() *token { return newToken(0, day) }, 250, 100 * day},
		{"1 h", func() *token { return newToken(0, time.Hour) }, 250, 100 * time.Hour},
		{"5 min", func() *token { return newToken(0, 5*time.Minute) }, 250, 500 * time.Minute},
		{"23 h old", func() *token {
			tok := newToken(0, time.Hour)
			tok.notBefore = tok.notBefore.Add(-23 * time.Hour)
			return tok
		}, 1000, 100 * time.Hour},
		{"no not_before", func() *token {
			tok := newToken(0, day)
			tok.notBefore = time.Time{}
			return tok
		}, 250, 100 * day},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				i := &scripted{}
				i.answer = func(_ context.Context, call int, _ round) (*token, error) {
					tok := tc.tok()
					tok.value = fmt.Sprint("token", call)
					return tok, nil
				}
				e := newEntry(t, i)
				_, _ = e.get(t.Context())
				for end := time.Now().Add(tc.duration); time.Now().Before(end); {
					time.Sleep(tc.duration / 5000)
					mustGet(t, e)
				}
				if got := i.calls(); got > tc.year {
					t.Errorf("%d requests, want at most %d", got, tc.year)
				}
			})
		})
	}
}

func TestExpiredAnswerIsAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &scripted{}
		i.answer = func(_ context.Context, call int, _ round) (*token, error) {
			return newToken(call, -time.Second), nil
		}
		e := newEntry(t, i)
		_, err := e.get(t.Context())
		if err == nil || !strings.Contains(err.Error(), "expires_on") {
			t.Errorf("got %v, want an error about expires_on", err)
		}
	})
}

// skewedClock is a clock whose wall clock is off. In a bubble the clock cannot
// be suspended; but a wall clock that jumps ahead looks the same.
type skewedClock struct {
	systemClock
	skew atomic.Int64
}

func (c *skewedClock) now() instant {
	now := c.systemClock.now()
	now.wall += c.skew.Load()
	return now
}

func (c *skewedClock) step(d time.Duration) { c.skew.Add(int64(d)) }

func TestResumeAfterSuspend(t *testing.T) {
	for _, asleep := range []time.Duration{time.Hour, 13 * time.Hour, 25 * time.Hour, 30 * day} {
		t.Run(asleep.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				clock := &skewedClock{}
				i := &scripted{latency: time.Second}
				i.answer = func(_ context.Context, call int, _ round) (*token, error) {
					tok := newToken(call, day)
					tok.notBefore, tok.expiry = tok.notBefore.Add(time.Duration(clock.skew.Load())),
						tok.expiry.Add(time.Duration(clock.skew.Load()))
					return tok, nil
				}
				e := newSkewedEntry(t, i, clock, nil)
				_, _ = e.get(t.Context())
				clock.step(asleep)
				h, err := e.get(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if left := h.expiry.Sub(clock.now().time()); left <= 0 {
					t.Errorf("got a token that expired %v ago", -left)
				}
				// A source that nobody asks notices as well, by its next timer.
				clock.step(asleep)
				time.Sleep(6 * time.Minute)
				if got := e.status(); got.Survives < 10*time.Hour {
					t.Errorf("after another %v: %+v", asleep, got)
				}
			})
		})
	}
}

// The wall clock goes wrong while the service and IMDS stay right: no caller
// gets a token past its true expiry, and IMDS is not asked in a loop.
func TestWallClockSteps(t *testing.T) {
	for _, tc := range []struct {
		name  string
		steps []time.Duration // one every 2 h
		most  int             // requests in the 48 h
	}{
		{"a minute back and forth", []time.Duration{-time.Minute, time.Minute, time.Minute, -time.Minute}, 12},
		{"back a year", []time.Duration{-365 * day}, 12},
		{"back a day, again and again", []time.Duration{-day, -day, -day, -day, -day}, 20},
		{"ahead 13 hours", []time.Duration{13 * time.Hour}, 250},
		{"ahead a year, then right again", []time.Duration{365 * day, -365 * day}, 400},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				clock := &skewedClock{}
				i := &scripted{}
				e := newSkewedEntry(t, i, clock, nil)
				_, _ = e.get(t.Context())
				for h := range 48 {
					if h%2 == 1 && h/2 < len(tc.steps) {
						clock.step(tc.steps[h/2])
					}
					for range 60 {
						time.Sleep(time.Minute)
						if h, err := e.get(t.Context()); err == nil && !time.Now().Before(h.expiry) {
							t.Fatalf("got a token that expired %v ago", time.Since(h.expiry))
						}
					}
				}
				mustGet(t, e)
				if got := i.calls(); got > tc.most {
					t.Errorf("%d requests, want at most %d", got, tc.most)
				}
			})
		})
	}
}

// The clock was ahead when the token came, and has been set right since. IMDS
// gives out the same token again, which is as good as it says.
func TestClockSetRight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clock := &skewedClock{}
		clock.step(8 * time.Hour)
		only := newToken(0, day)
		i := &scripted{answer: func(context.Context, int, round) (*token, error) { return only, nil }}
		e := newSkewedEntry(t, i, clock, nil)
		_, _ = e.get(t.Context())
		time.Sleep(time.Hour)
		clock.step(-8 * time.Hour)
		for range 22*60 + 59 {
			mustGet(t, e)
			time.Sleep(time.Minute)
		}
		time.Sleep(time.Minute)
		if _, err := e.get(t.Context()); err == nil {
			t.Error("the token has expired, and is handed out")
		}
	})
}

// The wall clock is wrong from the start, and IMDS and the service are right.
func TestWrongClock(t *testing.T) {
	for _, tc := range []struct {
		name   string
		off    time.Duration
		tokens bool // there are any
		most   int  // requests a day
	}{
		{"in 1970", -30 * 365 * day, true, 3},
		{"a day behind", -day, true, 3},
		{"a minute behind", -time.Minute, true, 3},
		{"a minute ahead", time.Minute, true, 3},
		{"10 hours ahead", 10 * time.Hour, true, 60},
		{"13 hours ahead", 13 * time.Hour, true, 130},
		{"23 hours 59 minutes ahead", day - time.Minute, true, 3000},
		{"two days ahead", 2 * day, false, 25_000},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				clock := &skewedClock{}
				clock.step(tc.off)
				i := &scripted{}
				e := newSkewedEntry(t, i, clock, nil)
				for range 2 * 24 * 60 {
					h, err := e.get(t.Context())
					switch {
					case err == nil && !time.Now().Before(h.expiry):
						t.Fatalf("got a token that expired %v ago", time.Since(h.expiry))
					case (err == nil) != tc.tokens:
						t.Fatalf("got %v", err)
					case err != nil && !strings.Contains(err.Error(), "clock"):
						t.Fatalf("%v: who would look at the clock?", err)
					}
					time.Sleep(time.Minute)
				}
				if got := i.calls() / 2; got > tc.most {
					t.Errorf("%d requests a day, want at most %d", got, tc.most)
				}
			})
		})
	}
}

// The wall clock is set while IMDS is asked.
func TestStepDuringFlight(t *testing.T) {
	for _, step := range []time.Duration{-365 * day, -day, -time.Hour, time.Hour, 12 * time.Hour, 25 * time.Hour} {
		for name, from := range map[string]time.Duration{"first": 0, "refresh": 13 * time.Hour} {
			t.Run(fmt.Sprint(name, step), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					clock := &skewedClock{}
					i := &scripted{latency: time.Minute}
					e := newSkewedEntry(t, i, clock, nil)
					if from > 0 {
						_, _ = e.get(t.Context())
						time.Sleep(time.Until(e.held.refreshOn) + time.Second)
					} else {
						go func() { _, _ = e.get(t.Context()) }()
						time.Sleep(time.Second)
					}
					clock.step(step)
					for range 3 * 24 * 60 {
						h, err := e.get(t.Context())
						if err == nil && !time.Now().Before(h.expiry) {
							t.Fatalf("got a token that expired %v ago", time.Since(h.expiry))
						}
						if err != nil && step < day {
							t.Fatal(err)
						}
						time.Sleep(time.Minute)
					}
					if got := i.calls(); step < 12*time.Hour && got > 12 {
						t.Errorf("%d requests in three days", got)
					}
				})
			})
		}
	}
}

// The wall clock was set back, and IMDS gives out a token again that has expired
// by the clock that goes on: it is not made to live longer.
func TestExpiredTokenComesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clock := &skewedClock{}
		only := newToken(0, day)
		i := &scripted{answer: func(context.Context, int, round) (*token, error) { return only, nil }}
		e := newSkewedEntry(t, i, clock, nil)
		_, _ = e.get(t.Context())
		clock.step(-10 * day)
		time.Sleep(day - time.Minute)
		mustGet(t, e)
		for range 10 {
			time.Sleep(time.Minute)
			if _, err := e.get(t.Context()); err == nil || !strings.Contains(err.Error(), "set back") {
				t.Fatalf("got %v, want an error", err)
			}
		}
	})
}

// The calls that matter touch no lock, so that nothing can hold them up: not
// even a refresh that hangs.
func TestCachedCallsTakeNoLock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &scripted{}
		e := newEntry(t, i)
		_, _ = e.get(t.Context())
		i.latency = time.Minute
		for range 12 * 60 {
			time.Sleep(time.Minute - time.Second)
			e.mu.Lock()
			locked := e.flight != nil || !e.clock.now().before(e.next)
			mustGet(t, e)
			e.mu.Unlock()
			if locked {
				return // a refresh was under way, and was not waited for
			}
			time.Sleep(time.Second)
		}
		t.Error("there was no refresh")
	})
}

// countingClock counts the timers that are set.
type countingClock struct {
	systemClock
	set atomic.Int64
}

func (c *countingClock) afterFunc(d time.Duration, f func()) stopper {
	c.set.Add(1)
	return &countedTimer{c.systemClock.afterFunc(d, func() { c.set.Add(-1); f() }), c}
}

type countedTimer struct {
	stopper
	clock *countingClock
}

func (t *countedTimer) Stop() bool {
	stopped := t.stopper.Stop()
	if stopped {
		t.clock.set.Add(-1)
	}
	return stopped
}

func TestTimers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clock := &countingClock{}
		i := &scripted{latency: time.Second}
		e := newSkewedEntry(t, i, clock, nil)
		for range 1000 {
			_, _ = e.get(t.Context())
			synctest.Wait()
			if got := clock.set.Load(); got > 1 {
				t.Fatalf("%d timers are set, want one", got)
			}
			time.Sleep(17 * time.Minute)
		}
		if got := clock.set.Load(); got != 1 {
			t.Errorf("%d timers are set at rest, want one", got)
		}
		e.cache.close()
		if got := clock.set.Load(); got != 0 {
			t.Errorf("%d timers are set after close, want none", got)
		}
	})
}

func TestClose(t *testing.T) {
	t.Run("releases who waits", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			e := newEntry(t, &scripted{latency: time.Hour})
			var wg sync.WaitGroup
			for range 100 {
				wg.Go(func() {
					if _, err := e.get(context.Background()); !errors.Is(err, ErrClosed) {
						t.Errorf("got %v, want ErrClosed", err)
					}
				})
			}
			synctest.Wait()
			begin := time.Now()
			e.cache.close()
			wg.Wait()
			if got := time.Since(begin); got > 0 {
				t.Errorf("took %v", got)
			}
		})
	})
	t.Run("ends refreshes and tokens", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			i := &scripted{}
			e := newEntry(t, i)
			_, _ = e.get(t.Context())
			e.cache.close()
			e.cache.close()
			if _, err := e.get(t.Context()); !errors.Is(err, ErrClosed) {
				t.Errorf("got %v, want ErrClosed", err)
			}
			if _, err := e.renew(t.Context(), "claims"); !errors.Is(err, ErrClosed) {
				t.Errorf("renew: got %v, want ErrClosed", err)
			}
			if got := e.status(); got.State != "closed" || got.Survives != 0 {
				t.Errorf("status is %+v, want closed", got)
			}
			time.Sleep(3 * day)
			if got := i.calls(); got != 1 {
				t.Errorf("%d requests, want 1", got)
			}
		})
	})
	t.Run("during a refresh", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			i := &scripted{}
			i.answer = func(ctx context.Context, call int, _ round) (*token, error) {
				if call > 0 {
					<-ctx.Done()
				}
				return newToken(call, day), nil // all the same
			}
			e := newEntry(t, i)
			_, _ = e.get(t.Context())
			time.Sleep(day / 2)
			e.cache.close()
			if _, err := e.get(t.Context()); !errors.Is(err, ErrClosed) {
				t.Errorf("got %v, want ErrClosed", err)
			}
		})
	})
	t.Run("from a hook", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var e *entry
			e = newSkewedEntry(t, &scripted{}, systemClock{}, func(Event) { e.cache.close() })
			_, _ = e.get(t.Context())
			synctest.Wait()
			if _, err := e.get(t.Context()); !errors.Is(err, ErrClosed) {
				t.Errorf("got %v, want ErrClosed", err)
			}
		})
	})
}

func TestIssuerThatMisbehaves(t *testing.T) {
	var nothing map[string]int
	for _, tc := range []struct {
		name   string
		answer func(context.Context, int, round) (*token, error)
		want   string
	}{
		{"panics", func(context.Context, int, round) (*token, error) { panic("secret") }, "panic of type string"},
		{"has a bug", func(context.Context, int, round) (*token, error) {
			nothing["x"]++
			return nil, nil
		}, "assignment to entry in nil map"},
		{"exits", func(context.Context, int, round) (*token, error) {
			runtime.Goexit()
			return nil, nil
		}, "ended its goroutine"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				bad := true
				i := &scripted{}
				i.answer = func(ctx context.Context, call int, r round) (*token, error) {
					if bad {
						return tc.answer(ctx, call, r)
					}
					return newToken(call, day), nil
				}
				e := newEntry(t, i)
				_, err := e.get(t.Context())
				if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "secret") {
					t.Errorf("got %v, want %q", err, tc.want)
				}
				bad = false
				time.Sleep(5 * time.Second)
				if _, err := e.get(t.Context()); err != nil {
					t.Errorf("afterwards: %v", err)
				}
			})
		})
	}
}

func TestHooksThatPanic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache(&scripted{}, systemClock{}, slog.New(panickingHandler{}), func(Event) { panic("hook") })
		defer c.close()
		e := c.add("https://service")
		_, _ = e.get(t.Context())
		time.Sleep(3 * day)
		mustGet(t, e)
	})
}

// A logger may call a service with a token itself, and must not wait for us.
func TestPanicIsLoggedLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c *cache
		h := &tokenHandler{Handler: slog.DiscardHandler}
		i := &scripted{answer: func(context.Context, int, round) (*token, error) { panic("bug") }}
		c = newCache(i, systemClock{}, slog.New(h), nil)
		defer c.close()
		h.entry = c.add("https://service")
		if _, err := h.entry.get(t.Context()); err == nil || !strings.Contains(err.Error(), "panic") {
			t.Errorf("got %v, want the panic", err)
		}
		synctest.Wait()
	})
}

type tokenHandler struct {
	slog.Handler
	entry *entry
}

func (h *tokenHandler) Enabled(ctx context.Context, _ slog.Level) bool {
	_, _ = h.entry.get(ctx)
	return true
}

type panickingHandler struct{ slog.Handler }

func (panickingHandler) Enabled(context.Context, slog.Level) bool { panic("logger") }
func (h panickingHandler) WithAttrs([]slog.Attr) slog.Handler     { return h }

func TestClaimsGetPastTheCacheOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &scripted{latency: time.Second}
		e := newEntry(t, i)
		_, _ = e.get(t.Context())
		time.Sleep(time.Hour)
		renew := func(claims, want string, calls int) {
			t.Helper()
			h, err := e.renew(t.Context(), claims)
			if err != nil || h.oauth2.AccessToken != want {
				t.Errorf("renew(%q) = %v, %v, want %s", claims, h, err, want)
			}
			if got := i.calls(); got != calls {
				t.Errorf("renew(%q): %d requests, want %d", claims, got, calls)
			}
		}
		// 100 requests are refused, as one.
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() { renew("a", "token1", 2) })
		}
		wg.Wait()
		renew("a", "token1", 2)
		if got := i.rounds[1]; got.claims != "a" || !got.renew() {
			t.Errorf("the round is %+v", got)
		}
		// A service that is never content is not IMDS's problem.
		renew("b", "token1", 2)
		time.Sleep(longGap)
		renew("a", "token1", 2)
		renew("b", "token2", 3)
		// An outage leaves the token in hand alone.
		time.Sleep(longGap)
		i.answer = func(context.Context, int, round) (*token, error) { return nil, errOutage }
		if _, err := e.renew(t.Context(), "c"); !errors.Is(err, errOutage) {
			t.Errorf("got %v, want the outage", err)
		}
		mustGet(t, e)
	})
}

// A service that had enough of a token gets another one, even if that is not to
// live as long. The same one again is no reason to ask before it is due.
func TestClaimsTakeWhatIsOffered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &scripted{}
		same := newToken(0, day)
		i.answer = func(_ context.Context, call int, r round) (*token, error) {
			switch r.claims {
			case "short":
				return newToken(call, time.Hour), nil
			default:
				return same, nil
			}
		}
		e := newEntry(t, i)
		_, _ = e.get(t.Context())
		time.Sleep(time.Hour)
		if h, err := e.renew(t.Context(), "nothing else"); err != nil || h.oauth2.AccessToken != "token0" {
			t.Errorf("got %v, %v, want the same token", h, err)
		}
		time.Sleep(8 * time.Hour)
		if got := i.calls(); got != 2 {
			t.Errorf("%d requests, want 2: the token is not due", got)
		}
		h, err := e.renew(t.Context(), "short")
		if err != nil || h.oauth2.AccessToken != "token2" || mustGet(t, e) != "token2" {
			t.Errorf("got %v, %v, want the shorter token", h, err)
		}
	})
}

// A challenge is for the token in hand: after the next refresh it may come again.
func TestClaimsAreForOneToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &scripted{}
		e := newEntry(t, i)
		_, _ = e.get(t.Context())
		for range 5 {
			time.Sleep(day * 3 / 4)
			before := i.calls()
			for range 3 {
				if _, err := e.renew(t.Context(), "the same each time"); err != nil {
					t.Fatal(err)
				}
			}
			if got := i.calls() - before; got != 1 {
				t.Errorf("%d requests, want 1", got)
			}
		}
	})
}

func TestClaimsOfTheFirstToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &scripted{}
		e := newEntry(t, i)
		if _, err := e.renew(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
		if _, err := e.renew(t.Context(), "a"); err != nil || i.calls() != 1 {
			t.Errorf("%d requests, %v", i.calls(), err)
		}
		if got := i.rounds[0]; got.claims != "a" || !got.patient {
			t.Errorf("the round is %+v", got)
		}
		i.answer = func(context.Context, int, round) (*token, error) { return nil, errOutage }
		other := e.cache.add("other")
		for range 100 {
			if _, err := other.renew(t.Context(), "a"); !errors.Is(err, errOutage) {
				t.Errorf("got %v, want the outage", err)
			}
		}
		if got := i.calls(); got != 2 {
			t.Errorf("%d requests, want 2: a failure is held", got)
		}
	})
}

// A flight that began before the challenge does not answer it.
func TestClaimsDuringARefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := &scripted{latency: time.Second}
		e := newEntry(t, i)
		_, _ = e.get(t.Context())
		time.Sleep(time.Until(e.held.refreshOn) + time.Millisecond)
		synctest.Wait()
		h, err := e.renew(t.Context(), "a")
		if err != nil || h.oauth2.AccessToken != "token2" {
			t.Errorf("got %v, %v, want token2", h, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		time.Sleep(longGap)
		if _, err := e.renew(ctx, "b"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the deadline", err)
		}
	})
}

func TestStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		i := &scripted{answer: outage(begin.Add(time.Hour), begin.Add(10*day))}
		e := newEntry(t, i)
		check := func(state string, survives time.Duration, failing bool) {
			t.Helper()
			s := e.status()
			if s.State != state || s.Survives != survives || (s.Failures > 0) != failing ||
				strings.Contains(s.LastError, "outage") != failing || s.Source != "script" {
				t.Errorf("status is %+v, want %s, %v", s, state, survives)
			}
		}
		check("empty", 0, false)
		_, _ = e.get(t.Context())
		check("fresh", day, false)
		time.Sleep(9 * time.Hour)
		check("fresh", 15*time.Hour, false)
		time.Sleep(5 * time.Hour)
		check("due", 10*time.Hour, true)
		time.Sleep(10 * time.Hour)
		check("expired", 0, true)
		if s := e.status(); !s.LastSuccess.Equal(begin) || !s.Expiry.Equal(begin.Add(day)) ||
			s.RefreshOn.Before(begin.Add(day*4/10)) || s.RefreshOn.After(begin.Add(day/2)) {
			t.Errorf("status is %+v", s)
		}
	})
}

func TestEventsAndLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		var log strings.Builder
		var events []Event
		i := &scripted{latency: time.Second, answer: outage(begin.Add(time.Hour), begin.Add(18*time.Hour))}
		c := newCache(i, systemClock{}, slog.New(slog.NewTextHandler(&log, nil)),
			func(ev Event) { events = append(events, ev) })
		e := c.add("https://service")
		_, _ = e.get(t.Context())
		time.Sleep(36 * time.Hour)
		c.close()
		if len(events) != i.calls() {
			t.Errorf("%d events of %d attempts", len(events), i.calls())
		}
		for n, ev := range events {
			failed := ev.Start.After(begin.Add(time.Hour)) && ev.Start.Before(begin.Add(18*time.Hour-time.Second))
			if ev.Resource != "https://service" || ev.Source != "script" || ev.Duration != time.Second ||
				(ev.Err != nil) != failed || ev.New == failed || ev.Expiry.IsZero() {
				t.Errorf("event %d is %+v", n, ev)
			}
		}
		lines := strings.Split(strings.TrimSpace(log.String()), "\n")
		want := []string{"tokens are issued", "token not refreshed", "tokens are issued again"}
		if len(lines) != len(want) {
			t.Fatalf("the log has %d lines, want %d:\n%s", len(lines), len(want), &log)
		}
		for n, line := range lines {
			if !strings.Contains(line, want[n]) || !strings.Contains(line, "source=script") {
				t.Errorf("line %d is %q, want %q", n, line, want[n])
			}
			if strings.Contains(line, "token0") {
				t.Errorf("line %d has a token in it", n)
			}
		}
	})
}

func TestFirstFailureIsLogged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		i := &scripted{answer: func(context.Context, int, round) (*token, error) { return nil, errOutage }}
		c := newCache(i, systemClock{}, slog.New(slog.NewTextHandler(&log, nil)), nil)
		defer c.close()
		for range 3 {
			_, _ = c.add("https://service").get(t.Context())
			time.Sleep(time.Minute)
		}
		if got := strings.Count(log.String(), "mitoken: no token"); got != 1 {
			t.Errorf("logged %d times:\n%s", got, &log)
		}
	})
}

func TestCachedCallsDoNotAllocate(t *testing.T) {
	cred := &Credential{IMDSTransport: answering(validAnswer)}
	defer cred.Close()
	src := cred.TokenSource("https://service")
	opts := policy.TokenRequestOptions{Scopes: []string{"https://service/.default"}}
	if _, err := src.Token(); err != nil {
		t.Fatal(err)
	}
	for name, call := range map[string]func(){
		"Token":        func() { _, _ = src.Token() },
		"TokenContext": func() { _, _ = src.TokenContext(t.Context()) },
		"GetToken":     func() { _, _ = cred.GetToken(t.Context(), opts) },
	} {
		if got := testing.AllocsPerRun(1000, call); got != 0 {
			t.Errorf("%s: %v allocations, want none", name, got)
		}
	}
}

// A source that nobody uses costs no goroutine: what wakes it is a timer.
func TestNoGoroutineAtRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		before := runtime.NumGoroutine()
		for range 100 {
			cred := &Credential{Upstream: &upstream{}}
			defer cred.Close()
			if _, err := cred.TokenSource("r").Token(); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		if after := runtime.NumGoroutine(); after > before { // some of other tests may have ended
			t.Errorf("%d goroutines for 100 sources", after-before)
		}
	})
}
