package mitoken

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"sync/atomic"
	"time"

	"golang.org/x/oauth2"
)

// This file is one round of asking an issuer, from the launch to what comes of
// it: a token in the cache, or a failure, and when to ask next.

// flightTimeout bounds one round of asking an issuer, retries and all. IMDS may
// be away for 70 seconds while it is upgraded, which a first token waits for.
const flightTimeout = 2 * time.Minute

// An issuer asks whoever issues tokens for one, now. It does not cache and does
// not schedule. Its methods are safe for concurrent use.
type issuer interface {
	// issue returns a token for the resource. It gives up when ctx is done.
	issue(ctx context.Context, resource string, r round) (*token, error)
	// source names who issues: Event.Source.
	source() string
}

// A round says what is expected of an issuer this time.
type round struct {
	patient bool        // nobody has a token to use meanwhile: retry before giving up
	held    time.Time   // when the token in hand expires, which is to be renewed; zero if none
	forced  bool        // before its time, by a service that refuses the token in hand
	claims  string      // what a service demanded of the token (a claims challenge), or empty
	failed  func(error) // is told of each try that failed
}

// renew reports whether a token is in hand, so that the same one from a cache on
// the way is of no use.
func (r round) renew() bool { return !r.held.IsZero() }

// A token is what an issuer gave.
type token struct {
	value     string
	expiry    time.Time
	notBefore time.Time     // zero if unknown
	expiresIn time.Duration // from the issue to expiry; zero if unknown
}

// A flight is one round of asking the issuer, shared by all who wait for it.
type flight struct {
	round round
	begin instant
	done  chan struct{} // closed when it is over
	err   error         // set before done is closed
	note  atomic.Value  // of type tried: why the round is not over yet
}

// tried is the failure of one try in a round that goes on.
type tried struct{ error }

// launch sends off a flight. e.mu is held, and no flight is under way.
func (e *entry) launch(now instant, r round) {
	f := &flight{round: r, begin: now, done: make(chan struct{})}
	f.round.failed = func(err error) { f.note.Store(tried{err}) }
	e.flight = f
	e.publish()
	e.stop()
	e.cache.flights.Add(1)
	go e.fly(f)
}

// fly asks the issuer. Its context belongs to the cache: no caller's end is the
// end of a flight.
func (e *entry) fly(f *flight) {
	ctx, cancel := context.WithTimeout(e.cache.ctx, flightTimeout)
	defer cancel()
	var tok *token
	err := errors.New("the issuer ended its goroutine") // unless it returns
	defer func() {
		p := recover()
		if p == nil {
			e.land(f, tok, err)
			return
		}
		stack := debug.Stack()
		if r, ok := p.(*relayed); ok {
			p, stack = r.value, r.stack
		}
		e.land(f, nil, panicError(p))
		e.cache.logPanic(p, stack) // last: the logger may need a token itself
	}()
	tok, err = e.cache.issuer.issue(ctx, e.resource, f.round)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() != nil {
		// Not wrapped: the deadline is ours, and no caller's has passed.
		err = fmt.Errorf("no answer within %v: %v", flightTimeout, err)
	}
}

// land ends a flight: it settles the entry, releases the waiters, and only then
// lets the hooks know.
func (e *entry) land(f *flight, tok *token, err error) {
	r := e.settle(f, tok, err)
	close(f.done)
	e.cache.flights.Done()
	if !e.closed() {
		e.cache.tell(r)
	}
}

// settle stores what a flight brought and when to ask next, and reports it.
func (e *entry) settle(f *flight, tok *token, err error) report {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.clock.now()
	e.flight = nil
	r := report{failures: e.failures, Event: Event{
		Resource: e.resource,
		Source:   e.cache.issuer.source(),
		Start:    f.begin.time(),
		Duration: time.Duration(now.mono - f.begin.mono),
	}}
	if err == nil {
		r.New, err = e.take(now, tok, f.round)
	}
	if err != nil {
		f.err = e.fail(now, f.round, err)
		r.Err = f.err
	} else {
		e.failures, e.err = 0, nil
		e.lastSuccess = now.time()
	}
	if e.held != nil {
		r.Expiry = e.held.expiry
	}
	if !e.closed() {
		e.publish()
		e.sleep(now)
	}
	return r
}

// take puts a token that was issued in the place of the one in hand, and
// reports whether it has. IMDS answers from a cache of its own, so the same
// token, or even an older one, is no error: there will be a newer one later. One
// that was issued for a claims challenge need not be newer.
func (e *entry) take(now instant, tok *token, r round) (taken bool, err error) {
	remaining, lifetime := tok.lifespan(now)
	same := e.held != nil && e.held.oauth2.AccessToken == tok.value
	if same && e.valid(now) {
		if r.claims != "" {
			e.claims = r.claims // this is all the answer there is
		}
		e.probe(now)
		return false, nil
	}
	received := now
	if same { // it has expired, by a clock that has been set since
		received, lifetime = e.held.received, e.held.lifetime
		age := time.Duration(now.mono - received.mono)
		remaining = min(remaining, lifetime-age)
	}
	switch {
	case remaining < time.Second && tok.expiry.Sub(now.time()) < time.Second:
		return false, fmt.Errorf("expires_on is %v, and it is %v: an expired token, or a wrong clock",
			tok.expiry.UTC().Format(time.RFC3339), now.time().UTC().Format(time.RFC3339))
	case remaining < time.Second:
		return false, errors.New("the token that has expired came again, and expires_on says " +
			"that it has not: the clock was set back")
	case e.valid(now) && r.claims == "" && !tok.expiry.After(e.held.expiry) &&
		!(r.forced && tok.expiry.Equal(e.held.expiry)):
		e.probe(now)
		return false, nil
	}
	e.next = now.add(refreshDelay(remaining, lifetime, rand.Float64()))
	e.claims, e.repeats = r.claims, 0
	e.held = &held{
		oauth2:    &oauth2.Token{AccessToken: tok.value, TokenType: "Bearer", Expiry: tok.expiry},
		header:    "Bearer " + tok.value,
		expiry:    tok.expiry,
		refreshOn: e.next.time(),
		lifetime:  lifetime,
		received:  received,
		due:       e.next,
		expires:   now.add(remaining),
	}
	return !same, nil
}

// probe puts off the next request, after an answer that brought nothing new.
func (e *entry) probe(now instant) {
	e.repeats++
	soon := now.add(gap(e.held.lifetime))
	if e.next = e.held.due; !soon.before(e.next) {
		left := now.until(e.held.expires)
		e.next = now.add(probeDelay(left, e.held.lifetime, rand.Float64()))
	}
}

// fail counts a failure, which never touches the token in hand, and returns the
// error that callers get until the next attempt.
func (e *entry) fail(now instant, r round, err error) error {
	var after time.Duration
	if refusal, ok := errors.AsType[*ResponseError](err); ok {
		after = refusal.retryAfter
	}
	switch {
	case e.held == nil:
		e.next = now.add(holdDelay(after, rand.Float64()))
	case r.forced && now.before(e.held.due):
		e.next = e.held.due // nothing is wrong but with one service
	default:
		left := now.until(e.held.expires)
		e.next = now.add(retryDelay(e.failures, left, e.held.lifetime, after, rand.Float64()))
	}
	e.failures++
	if e.closed() {
		err = ErrClosed
	}
	e.err = e.errorf("%w", err)
	return e.err
}
