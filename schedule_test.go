package mitoken

import (
	"testing"
	"time"
)

const day = 24 * time.Hour

func TestInstant(t *testing.T) {
	deadline := instant{100, 100}
	for _, tc := range []struct {
		name   string
		now    instant
		before bool
		until  time.Duration
	}{
		{"both clocks early", instant{90, 80}, true, 10},
		{"wall clock there", instant{100, 80}, false, 0},
		{"monotonic clock there", instant{80, 100}, false, 0},
		{"resumed: only the wall clock went on", instant{5000, 50}, false, -4900},
		{"stepped back: only the monotonic clock went on", instant{-5000, 120}, false, -20},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := tc.now.before(deadline); got != tc.before {
				t.Errorf("before = %v, want %v", got, tc.before)
			}
			if got := tc.now.until(deadline); got != tc.until {
				t.Errorf("until = %v, want %v", got, tc.until)
			}
		})
	}
	if got, want := (instant{1, 4}).earlier(instant{2, 3}), (instant{1, 3}); got != want {
		t.Errorf("earlier = %v, want %v", got, want)
	}
}

func TestLifespan(t *testing.T) {
	start := time.Unix(1_700_000_000, 0)
	now := instant{wall: start.UnixNano()}
	for _, tc := range []struct {
		name                string
		expiry              time.Duration // from now
		age                 time.Duration // not_before, to now; negative if unknown
		expiresIn           time.Duration
		remaining, lifetime time.Duration
	}{
		{"just issued", day, 0, day, day, day},
		{"from the cache of IMDS", 8 * time.Hour, 16 * time.Hour, day, 8 * time.Hour, day},
		{"no not_before", day, -1, 0, day, day},
		{"no not_before, old", time.Hour, -1, day, time.Hour, time.Hour},
		{"not_before makes no sense", time.Hour, -10 * time.Hour, 0, time.Hour, time.Hour},
		{"not_before is in 1970", time.Hour, time.Duration(start.UnixNano()), 0, time.Hour, time.Hour},
		{"expires_in contradicts, not_before decides", day, 0, time.Hour, day, day},
		{"our clock is 2 h behind", 26 * time.Hour, -2 * time.Hour, 0, day, day},
		{"our clock is behind, no not_before", 26 * time.Hour, -1, day, day, day},
		{"our clock is in 1970", time.Duration(start.UnixNano()), -1, 0, maxLifetime, maxLifetime},
		{"expired", -time.Second, 0, 0, -time.Second, -time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tok := &token{expiry: start.Add(tc.expiry), expiresIn: tc.expiresIn}
			if tc.age != -1 {
				tok.notBefore = start.Add(-tc.age)
			}
			remaining, lifetime := tok.lifespan(now)
			if remaining != tc.remaining || lifetime != tc.lifetime {
				t.Errorf("lifespan = %v of %v, want %v of %v", remaining, lifetime, tc.remaining, tc.lifetime)
			}
		})
	}
}

func TestRefreshDelay(t *testing.T) {
	for _, tc := range []struct {
		name                string
		remaining, lifetime time.Duration
		min, max            time.Duration // at u = 1 and 0
	}{
		{"24 h", day, day, 9*time.Hour + 36*time.Minute, 12 * time.Hour},
		{"1 h", time.Hour, time.Hour, 24 * time.Minute, 30 * time.Minute},
		{"5 min", 5 * time.Minute, 5 * time.Minute, 2 * time.Minute, 150 * time.Second},
		{"10 s", 10 * time.Second, 10 * time.Second, 4 * time.Second, 5 * time.Second},
		{"6 h old", 18 * time.Hour, day, 3*time.Hour + 36*time.Minute, 6 * time.Hour},
		{"23 h old: soon, not at once", time.Hour, day, 6 * time.Minute, 9 * time.Minute},
		{"a minute left", time.Minute, day, 30 * time.Second, 30 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, u := range []float64{0, 0.001, 0.25, 0.5, 0.75, 0.9999999} {
				got := refreshDelay(tc.remaining, tc.lifetime, u)
				if got < tc.min || got > tc.max {
					t.Errorf("refreshDelay(u = %v) = %v, want within [%v, %v]", u, got, tc.min, tc.max)
				}
			}
		})
	}
}

// A refresh drawn so close to half the lifetime that the next probe would be
// past it waits for it, or a probe would find a token past its half.
func TestRefreshNeverSkipsHalf(t *testing.T) {
	for u := 0.0; u < 1; u += 0.0001 {
		left := day - refreshDelay(day, day, u)
		for i := 0; left > day/2; i++ {
			left -= probeDelay(left, day, u)
			if i > 20 {
				t.Fatalf("u = %v: half the lifetime is not reached in %d probes", u, i)
			}
		}
		if left != day/2 {
			t.Fatalf("u = %v: asked with %v left, want %v", u, left, day/2)
		}
	}
}

func TestProbeDelay(t *testing.T) {
	for _, tc := range []struct {
		name                string
		remaining, lifetime time.Duration
		min, max            time.Duration
	}{
		{"much left", 12 * time.Hour, day, 12 * time.Minute, 18 * time.Minute},
		{"an hour left", time.Hour, day, 6 * time.Minute, 9 * time.Minute},
		{"half the lifetime is near", 12*time.Hour + 7*time.Minute, day, 7 * time.Minute, 7 * time.Minute},
		{"half of what is left", 6 * time.Minute, day, 3 * time.Minute, 3 * time.Minute},
		{"never less than the gap", 10 * time.Second, day, 30 * time.Second, 30 * time.Second},
		{"short-lived", 5 * time.Second, 10 * time.Second, time.Second, 2500 * time.Millisecond},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, u := range []float64{0, 0.5, 0.9999999} {
				got := probeDelay(tc.remaining, tc.lifetime, u)
				if got < tc.min || got > tc.max {
					t.Errorf("probeDelay(u = %v) = %v, want within [%v, %v]", u, got, tc.min, tc.max)
				}
			}
		})
	}
}

func TestRetryDelay(t *testing.T) {
	for _, tc := range []struct {
		name       string
		n          int
		remaining  time.Duration
		lifetime   time.Duration
		retryAfter time.Duration
		min, max   time.Duration
	}{
		{"first", 0, 12 * time.Hour, day, 0, 15 * time.Second, 30 * time.Second},
		{"second", 1, 12 * time.Hour, day, 0, 30 * time.Second, time.Minute},
		{"sixth", 5, 12 * time.Hour, day, 0, 450 * time.Second, 15 * time.Minute},
		{"hundredth", 99, 12 * time.Hour, day, 0, 450 * time.Second, 15 * time.Minute},
		{"a tenth of the time left", 99, time.Hour, day, 0, 3 * time.Minute, 6 * time.Minute},
		{"just before expiry", 99, time.Minute, day, 0, 15 * time.Second, 30 * time.Second},
		{"expired", 99, -time.Hour, day, 0, 15 * time.Second, 30 * time.Second},
		{"short-lived", 99, 5 * time.Second, 10 * time.Second, 0, 500 * time.Millisecond, time.Second},
		{"Retry-After is honored", 0, 12 * time.Hour, day, 2 * time.Minute, 2 * time.Minute, 2 * time.Minute},
		{"but not past a tenth", 0, 12 * time.Hour, day, day, 15 * time.Minute, 15 * time.Minute},
		{"nor when expired", 0, 0, day, day, 30 * time.Second, 30 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, u := range []float64{0, 0.5, 0.9999999} {
				got := retryDelay(tc.n, tc.remaining, tc.lifetime, tc.retryAfter, u)
				if got < tc.min || got > tc.max {
					t.Errorf("retryDelay(u = %v) = %v, want within [%v, %v]", u, got, tc.min, tc.max)
				}
			}
		})
	}
}

func TestHoldDelay(t *testing.T) {
	for _, u := range []float64{0, 0.5, 0.9999999} {
		if got := holdDelay(0, u); got < time.Second || got > 5*time.Second {
			t.Errorf("holdDelay(u = %v) = %v, want within [1s, 5s]", u, got)
		}
		if got := holdDelay(day, u); got != longGap {
			t.Errorf("holdDelay with a Retry-After of a day = %v, want %v", got, longGap)
		}
	}
}

// FuzzSchedule checks what must hold whatever an issuer and the clocks say: the
// next attempt is not now, and not after the token's end.
func FuzzSchedule(f *testing.F) {
	f.Add(int64(day), int64(0), int64(day), 0.5, 3)
	f.Add(int64(time.Second), int64(23*time.Hour), int64(0), 0.0, 0)
	f.Add(int64(-1), int64(-1), int64(1<<62), 0.99, 1000)
	f.Fuzz(func(t *testing.T, expiry, notBefore, expiresIn int64, u float64, n int) {
		if !(u >= 0 && u < 1) || n < 0 {
			t.Skip()
		}
		now := instant{wall: int64(50 * 365 * day)}
		tok := &token{expiry: now.time().Add(time.Duration(expiry)), expiresIn: time.Duration(expiresIn)}
		if notBefore != 0 {
			tok.notBefore = now.time().Add(-time.Duration(notBefore))
		}
		remaining, lifetime := tok.lifespan(now)
		if remaining <= 0 {
			return // nobody schedules by an expired token
		}
		if remaining > lifetime || lifetime > maxLifetime {
			t.Fatalf("lifespan = %v of %v", remaining, lifetime)
		}
		unit := gap(lifetime)
		for name, d := range map[string]time.Duration{
			"refreshDelay": refreshDelay(remaining, lifetime, u),
			"probeDelay":   probeDelay(remaining, lifetime, u),
			"retryDelay":   retryDelay(n, remaining, lifetime, time.Duration(expiresIn), u),
		} {
			least := unit / 2
			if d < least || d > max(remaining, unit) {
				t.Errorf("%s = %v, want within [%v, %v]", name, d, least, max(remaining, unit))
			}
		}
	})
}
