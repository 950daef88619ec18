package mitoken

import "time"

// This file holds the times of the refresh: the two clocks they are read from,
// and the rules that say when an issuer is asked next, as pure functions. What
// acts on them is in cache.go.

const (
	// maxLifetime bounds what is believed of a token's lifetime. Managed
	// identities get 24 hours, the longest-lived tokens of Entra 28; a longer
	// one is a wrong clock's doing.
	maxLifetime = 48 * time.Hour

	// maxSleep is how far ahead a timer is set. Timers run on the monotonic
	// clock, which stands still while a machine is suspended, so a long one
	// would ring hours late.
	maxSleep = 5 * time.Minute

	// longGap and shortGap bound the unit of waiting between two requests for
	// one token; see gap.
	longGap  = 30 * time.Second
	shortGap = time.Second
)

// An instant is one moment as both clocks tell it, in nanoseconds: the wall
// clock since 1970, the monotonic clock since the process started.
//
// Either clock alone is wrong at times: the wall clock is stepped, the
// monotonic one stops while the machine is suspended. So a deadline is an
// instant too, and has come as soon as either clock says so: a token is held
// for too short a time at worst, never for too long.
type instant struct {
	wall, mono int64
}

// add returns the instant d after t.
func (t instant) add(d time.Duration) instant {
	return instant{t.wall + int64(d), t.mono + int64(d)}
}

// before reports whether the deadline has not come at t.
func (t instant) before(deadline instant) bool {
	return t.wall < deadline.wall && t.mono < deadline.mono
}

// until returns how long it is from t to the deadline, on the clock that gets
// there first.
func (t instant) until(deadline instant) time.Duration {
	return time.Duration(min(deadline.wall-t.wall, deadline.mono-t.mono))
}

// earlier returns the deadline that has come when t or u has.
func (t instant) earlier(u instant) instant {
	return instant{min(t.wall, u.wall), min(t.mono, u.mono)}
}

// time returns t on the wall clock.
func (t instant) time() time.Time { return time.Unix(0, t.wall) }

// A clock tells the time and sets timers. It is a seam for tests: a
// testing/synctest bubble has a clock of its own, but one that is neither
// suspended nor stepped.
type clock interface {
	now() instant
	afterFunc(d time.Duration, f func()) stopper
}

// A stopper is a timer that can be stopped, as a [time.Timer] can.
type stopper interface {
	Stop() bool
}

// systemClock is the clock of the time package.
type systemClock struct{}

var processStart = time.Now()

func (systemClock) now() instant {
	t := time.Now() // reads both clocks
	return instant{t.UnixNano(), int64(t.Sub(processStart))}
}

func (systemClock) afterFunc(d time.Duration, f func()) stopper { return time.AfterFunc(d, f) }

// lifespan returns how long a token received at now is good for, and how long
// it was good for when it was issued.
//
// Its expiry is the truth; expires_in counts from the issue, and IMDS hands out
// tokens of an age. But no token outlives the lifetime it was issued with: one
// that seems to was read by a clock that is behind, and would be held too long.
func (tok *token) lifespan(now instant) (remaining, lifetime time.Duration) {
	remaining = tok.expiry.Sub(now.time())
	lifetime = tok.expiry.Sub(tok.notBefore)
	if tok.notBefore.IsZero() || lifetime <= 0 || lifetime > maxLifetime {
		lifetime = min(remaining, maxLifetime)
		if tok.expiresIn > 0 {
			lifetime = min(lifetime, tok.expiresIn)
		}
	}
	return min(remaining, lifetime), lifetime
}

// refreshDelay returns how long after its receipt a token is refreshed: when 40
// to 50 % of its lifetime is over, at a point that u, in [0, 1), draws.
//
// It is drawn once per token, since drawing at every look bunches a fleet at
// the early end, and early only, so that half the lifetime is always left to
// ride out an outage. A token that arrives past that point is treated as one
// that could not be renewed yet.
func refreshDelay(remaining, lifetime time.Duration, u float64) time.Duration {
	unit := gap(lifetime)
	early := time.Duration(u * float64(lifetime) / 10)
	if early < unit {
		early = 0 // or a token that cannot be renewed before half its life is asked for late
	}
	if d := remaining - lifetime/2 - early; d > 0 {
		return max(d, unit)
	}
	return probeDelay(remaining, lifetime, u)
}

// probeDelay returns how long to wait before asking again for a token after an
// answer that was not a newer one: IMDS has a cache too, and a token may not be
// renewable yet. An eighth of what remains, between 5 and 15 minutes, is cheap;
// but half the lifetime, when IMDS is most likely to have a newer one, is not
// slept through, nor is the expiry.
func probeDelay(remaining, lifetime time.Duration, u float64) time.Duration {
	unit := gap(lifetime)
	d := jitter(clamp(remaining/8, 10*unit, 30*unit), 0.8, 1.2, u)
	if half := remaining - lifetime/2; half > 0 && d > half-unit {
		d = half
	}
	return max(min(d, remaining/2), unit)
}

// retryDelay returns how long to wait after a failed attempt to renew a token,
// the n-th in a row counting from 0: exponentially longer, but never more than
// a tenth of the time that is left to succeed in, or 15 minutes. retryAfter is
// what the issuer asked for, zero if nothing; it is honoured as far as that.
func retryDelay(n int, remaining, lifetime, retryAfter time.Duration, u float64) time.Duration {
	unit := gap(lifetime)
	most := clamp(remaining/10, unit, 30*unit)
	d := unit << min(n, 5) // 2^5 units are past the most there can be
	return max(jitter(min(d, most), 0.5, 1, u), min(retryAfter, most))
}

// holdDelay returns how long the failure to get a first token is held, so that
// callers in a loop do not become requests in a loop.
func holdDelay(retryAfter time.Duration, u float64) time.Duration {
	return max(jitter(time.Second, 1, 5, u), min(retryAfter, longGap))
}

// gap returns the unit of waiting between requests for a token: 30 seconds for
// lifetimes from 8 minutes up, less for shorter ones, which would otherwise be
// over before the second request.
func gap(lifetime time.Duration) time.Duration {
	return clamp(lifetime/16, shortGap, longGap)
}

// jitter returns the point between lo*d and hi*d that u, in [0, 1), draws.
func jitter(d time.Duration, lo, hi, u float64) time.Duration {
	return time.Duration((lo + u*(hi-lo)) * float64(d))
}

func clamp(d, least, most time.Duration) time.Duration {
	return max(least, min(d, most))
}
