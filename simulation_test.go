package mitoken_test

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aztoso/mitoken"
	"github.com/aztoso/mitoken/imdsfake"
)

// This file proves the promise of the package over simulated months: what an
// outage costs whoever calls, what it costs IMDS, and how many can share one.

// TestOutageSweep starts outages of each kind and length at each quarter of an
// hour of two days, for a daemon that calls every five minutes and for one that
// calls once a day.
func TestOutageSweep(t *testing.T) {
	for _, kind := range []imdsfake.Fault{
		{Failure: imdsfake.Refuse}, {Status: http.StatusServiceUnavailable}, {Failure: imdsfake.Hang},
	} {
		for _, length := range []time.Duration{
			time.Minute, time.Hour, 6 * time.Hour, 12*time.Hour - time.Minute, 12 * time.Hour,
			23*time.Hour + 50*time.Minute, 25 * time.Hour,
		} {
			t.Run(fmt.Sprintf("%s%d for %v", kind.Failure, kind.Status, length), func(t *testing.T) {
				t.Parallel()
				for start := 15 * time.Minute; start <= 2*day; start += mitoken.Stride * 15 * time.Minute {
					synctest.Test(t, func(t *testing.T) {
						o := outage{kind: kind, start: start, length: length}
						o.check(t, 5*time.Minute)
					})
				}
				for start := time.Hour; start <= 2*day; start += 5 * time.Hour {
					synctest.Test(t, func(t *testing.T) {
						o := outage{kind: kind, start: start, length: length}
						o.check(t, day)
					})
				}
			})
		}
	}
}

// An outage of the metadata service, and how a daemon lives through it.
type outage struct {
	kind          imdsfake.Fault
	start, length time.Duration

	expiry      time.Time // of the token in hand when it began
	first, last time.Time // calls that failed
}

// check makes a call in every interval, and checks what the package promises:
// none waits while there is a token, and none fails in an outage of up to half a
// lifetime. In a longer one they fail from the expiry of the token in hand until
// the outage is over, give or take what the back-off allows.
func (o *outage) check(t *testing.T, every time.Duration) {
	fake := &imdsfake.Handler{Cache: imdsfake.NoCache}
	cred := &mitoken.Credential{IMDSTransport: fake}
	defer cred.Close()
	src := cred.TokenSource(resource)
	begin := time.Now()
	down := begin.Add(o.start)
	up := down.Add(o.length)
	for end := up.Add(max(2*time.Hour, every)); time.Now().Before(end); {
		o.call(t, src)
		next := time.Now().Add(every)
		if down.After(time.Now()) && !down.After(next) {
			time.Sleep(time.Until(down))
			o.expiry = src.Status().Expiry
			fault := o.kind
			fault.For = o.length
			fake.Inject(fault)
		}
		time.Sleep(time.Until(next))
	}
	if o.length <= day/2 {
		if !o.first.IsZero() {
			t.Fatalf("start %v: calls failed from %v on", o.start, o.first.Sub(begin))
		}
		return
	}
	if o.first.IsZero() {
		if o.expiry.Before(up.Add(-every)) {
			t.Fatalf("start %v: nobody noticed", o.start)
		}
		return
	}
	if late := o.first.Sub(o.expiry); late < 0 || late > every {
		t.Fatalf("start %v: the first call failed %v after the expiry", o.start, late)
	}
	// A try that hangs when the outage ends holds up the next one for 10 s.
	if late := o.last.Sub(up); late > 30*time.Second+10*time.Second {
		t.Fatalf("start %v: the last call failed %v after the end", o.start, late)
	}
}

func (o *outage) call(t *testing.T, src *mitoken.TokenSource) {
	called, status := time.Now(), src.Status()
	tok, err := src.Token()
	waited := time.Since(called)
	switch {
	case err == nil && !time.Now().Before(tok.Expiry):
		t.Fatalf("start %v: got an expired token", o.start)
	case status.Survives > 0 && (err != nil || waited > 0):
		t.Fatalf("start %v: a call got %v after %v, with a token in hand", o.start, err, waited)
	case err != nil && o.first.IsZero():
		o.first = called
	}
	if err != nil {
		o.last = called
	}
}

// unreliable is a metadata service that answers some of the time only.
type unreliable struct {
	*imdsfake.Handler
	chance float64
}

func (u *unreliable) RoundTrip(req *http.Request) (*http.Response, error) {
	if rand.Float64() >= u.chance {
		return nil, errors.New("connection reset")
	}
	return u.Handler.RoundTrip(req)
}

// TestFlapping has a metadata service that mostly fails. It is enough.
func TestFlapping(t *testing.T) {
	for _, chance := range []float64{0.01, 0.1, 0.5} {
		t.Run(fmt.Sprint(chance), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := &imdsfake.Handler{Cache: imdsfake.NoCache}
				cred := &mitoken.Credential{IMDSTransport: &unreliable{fake, chance}}
				defer cred.Close()
				src := cred.TokenSource(resource)
				failed, calls, started := 0, 60*24*10, false
				for range calls {
					had := src.Status().Survives > 0
					begin := time.Now()
					_, err := src.Token()
					if had && (err != nil || time.Since(begin) > 0) {
						t.Fatalf("a call got %v after %v, with a token in hand", err, time.Since(begin))
					}
					if started = started || err == nil; started && err != nil {
						failed++
					}
					time.Sleep(time.Minute)
				}
				// Once there is a token, one in ten is as good as always, and one in a
				// hundred is not never.
				if chance >= 0.1 && failed > 0 || failed > calls/2 {
					t.Errorf("%d of %d calls failed", failed, calls)
				}
			})
		})
	}
}

// TestBrownOut has a metadata service that is slow: too slow, or nearly so.
func TestBrownOut(t *testing.T) {
	for _, latency := range []time.Duration{9 * time.Second, 30 * time.Second} {
		t.Run(latency.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := &imdsfake.Handler{Cache: imdsfake.NoCache}
				cred := &mitoken.Credential{IMDSTransport: fake}
				defer cred.Close()
				src := cred.TokenSource(resource)
				if _, err := src.Token(); err != nil {
					t.Fatal(err)
				}
				first := src.Status().Expiry
				fake.Inject(imdsfake.Fault{Latency: latency})
				for range 23 * 60 {
					time.Sleep(time.Minute)
					begin := time.Now()
					if _, err := src.Token(); err != nil || time.Since(begin) > 0 {
						t.Fatalf("a call got %v after %v", err, time.Since(begin))
					}
				}
				if renewed := src.Status().Expiry.After(first); renewed != (latency < 10*time.Second) {
					t.Errorf("the token was renewed: %v", renewed)
				}
			})
		})
	}
}

// TestRetryAfterInBackground has a refresh that is told to come back at odd
// times. It comes back before the token expires, and not at once.
func TestRetryAfterInBackground(t *testing.T) {
	for _, after := range []string{"0", "1", "86400", "-1", "99999999999999999999", "Fri, 31 Dec 1999 23:59:59 GMT", "soon"} {
		t.Run(after, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := &imdsfake.Handler{Cache: imdsfake.NoCache}
				cred := &mitoken.Credential{IMDSTransport: fake}
				defer cred.Close()
				src := cred.TokenSource(resource)
				if _, err := src.Token(); err != nil {
					t.Fatal(err)
				}
				fake.Inject(imdsfake.Fault{Status: 429, RetryAfter: after, For: 20 * time.Hour})
				time.Sleep(20*time.Hour + 16*time.Minute)
				requests := fake.Requests()
				if last := requests[len(requests)-1]; last.Status != 200 {
					t.Errorf("a quarter of an hour after the end it got %d", last.Status)
				}
				for i := 2; i < len(requests); i++ {
					if gap := requests[i].Time.Sub(requests[i-1].Time); gap < 15*time.Second || gap > 15*time.Minute {
						t.Errorf("request %d came %v after the one before", i, gap)
					}
				}
			})
		})
	}
}

// TestCachesOfIMDS is each way in which IMDS may hand out tokens, for ten days,
// with a bound on the requests that it costs.
func TestCachesOfIMDS(t *testing.T) {
	for _, tc := range []struct {
		name     string
		cache    imdsfake.Cache
		requests int           // a day, at most
		least    time.Duration // that is left of a token, at least
	}{
		{"a new one each time", imdsfake.NoCache, 3, day / 2},
		{"the same until half its life is over", imdsfake.UntilHalfLife, 30, day / 2},
		{"the same until 5 minutes before its end", imdsfake.UntilLastMinutes, 75, 0},
		{"the same until its end", imdsfake.UntilExpiry, 80, 0},
		{"two in turn", imdsfake.Alternating, 60, day/2 - 20*time.Minute},
		{"older ones after newer ones", imdsfake.OlderAfterNewer, 30, day/2 - 20*time.Minute},
		{"an old one at first", imdsfake.AgedFirst, 75, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := &imdsfake.Handler{Cache: tc.cache}
				cred := &mitoken.Credential{IMDSTransport: fake}
				defer cred.Close()
				src := cred.TokenSource(resource)
				least := day
				const days = 10
				for n := range days * 24 * 60 {
					begin := time.Now()
					tok, err := src.Token()
					if err != nil || n > 0 && time.Since(begin) > 0 {
						t.Fatalf("a call got %v after %v", err, time.Since(begin))
					}
					least = min(least, time.Until(tok.Expiry))
					time.Sleep(time.Minute)
				}
				if least < tc.least {
					t.Errorf("once, only %v were left, want %v", least, tc.least)
				}
				if got := len(fake.Requests()) / days; got > tc.requests {
					t.Errorf("%d requests a day, want at most %d", got, tc.requests)
				}
			})
		})
	}
}

// TestNode starts many processes on one machine at the same time.
func TestNode(t *testing.T) {
	for _, n := range []int{1, 30, 110, 250} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			for range 5 {
				synctest.Test(t, func(t *testing.T) {
					fake := &imdsfake.Handler{Limits: imdsfake.Limits{PerSecond: 20, AtOnce: 5}}
					fake.Inject(imdsfake.Fault{Latency: 30 * time.Millisecond})
					begin := time.Now()
					var wg sync.WaitGroup
					for range n {
						wg.Go(func() {
							cred := &mitoken.Credential{IMDSTransport: fake} // a process: a limiter of its own
							defer cred.Close()
							time.Sleep(rand.N(50 * time.Millisecond))
							if _, err := cred.TokenSource(resource).Token(); err != nil {
								t.Error(err)
							}
						})
					}
					wg.Wait()
					if took := time.Since(begin); took > time.Minute {
						t.Errorf("the last one was served after %v", took)
					}
					requests := fake.Requests()
					refused := 0
					for _, r := range requests {
						if r.Status == http.StatusTooManyRequests {
							refused++
						}
					}
					t.Logf("%d processes: %d requests, %d of them refused, in %v", n, len(requests), refused, time.Since(begin))
					if len(requests) > 6*n {
						t.Errorf("%d requests of %d processes", len(requests), n)
					}
				})
			}
		})
	}
}

// TestFleet starts 10,000 daemons in the same second. Their refreshes are spread
// out: no minute has more than half as many again as an even spread would have.
func TestFleet(t *testing.T) {
	const n = 10_000
	synctest.Test(t, func(t *testing.T) {
		minutes := map[int64]int{}
		fake := &imdsfake.Handler{}
		cred := &mitoken.Credential{IMDSTransport: fake}
		defer cred.Close()
		begin := time.Now()
		for range n {
			// Ten thousand Credentials would do the same, one token each.
			one := &mitoken.Credential{IMDSTransport: fake}
			if _, err := one.TokenSource(resource).Token(); err != nil {
				t.Fatal(err)
			}
			minutes[int64(one.TokenSource(resource).Status().RefreshOn.Sub(begin)/time.Minute)]++
			one.Close()
		}
		peak, spread := 0, float64(n)/(day/10).Minutes()
		for _, m := range minutes {
			peak = max(peak, m)
		}
		if most := int(math.Ceil(1.5 * spread)); peak > most {
			t.Errorf("%d refreshes in one minute, want at most %d", peak, most)
		}
	})
}

// TestStorms has 10,000 callers at once, in each state.
func TestStorms(t *testing.T) {
	const n = 10_000
	for name, after := range map[string]time.Duration{"due": 13 * time.Hour, "expired": 25 * time.Hour} {
		for _, works := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s works=%v", name, works), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					fake := &imdsfake.Handler{Cache: imdsfake.NoCache}
					cred := &mitoken.Credential{IMDSTransport: fake}
					defer cred.Close()
					src := cred.TokenSource(resource)
					if _, err := src.Token(); err != nil {
						t.Fatal(err)
					}
					fake.Inject(imdsfake.Fault{Failure: imdsfake.Refuse})
					time.Sleep(after)
					if works {
						fake.Clear()
					}
					before := len(fake.Requests())
					var wg sync.WaitGroup
					for range n {
						wg.Go(func() {
							begin := time.Now()
							_, err := src.Token()
							if failed := err != nil; failed != (name == "expired") || time.Since(begin) > 0 {
								t.Errorf("got %v after %v", err, time.Since(begin))
							}
						})
					}
					wg.Wait()
					if got := len(fake.Requests()) - before; got > 1 {
						t.Errorf("%d requests, want one at most", got)
					}
					if !works {
						return
					}
					time.Sleep(15 * time.Minute)
					if _, err := src.Token(); err != nil || src.Status().State != "fresh" {
						t.Errorf("a quarter of an hour later: %v, %+v", err, src.Status())
					}
				})
			})
		}
	}
}

// TestNothingIsStuck closes a Credential in the middle of a storm.
func TestNothingIsStuck(t *testing.T) {
	for _, at := range []time.Duration{0, 10 * time.Millisecond, 5 * time.Second, 11 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			fake := &imdsfake.Handler{Cache: imdsfake.NoCache}
			fake.Inject(imdsfake.Fault{Failure: imdsfake.Hang})
			cred := &mitoken.Credential{IMDSTransport: fake}
			var wg sync.WaitGroup
			for i := range 1000 {
				wg.Go(func() {
					_, err := cred.TokenSource(fmt.Sprint("r", i%10)).Token()
					if err == nil || !errors.Is(err, mitoken.ErrClosed) && !strings.Contains(err.Error(), "closed") {
						t.Errorf("got %v, want ErrClosed", err)
					}
				})
			}
			time.Sleep(at)
			cred.Close()
			wg.Wait()
		})
	}
}
