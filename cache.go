package mitoken

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/oauth2"
)

// This file is the tokens in hand, and who gets what of them when. How a new one
// is got is in flight.go, and the times that it goes by are in schedule.go.

// A cache holds the tokens of one identity, an entry for each resource. It owns
// every goroutine and timer there is; close ends them.
type cache struct {
	issuer  issuer
	clock   clock
	logger  *slog.Logger // nil: silent
	observe func(Event)  // nil: nobody

	ctx     context.Context // of all flights; done after close
	cancel  context.CancelFunc
	flights sync.WaitGroup

	entries atomic.Pointer[map[string]*entry] // copied on write, so that reads take no lock
	first   atomic.Pointer[entry]             // of them
	mu      sync.Mutex                        // guards writes of entries
	named   atomic.Bool                       // the source has been logged
}

func newCache(issuer issuer, clock clock, logger *slog.Logger, observe func(Event)) *cache {
	c := &cache{issuer: issuer, clock: clock, logger: logger, observe: observe}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.entries.Store(&map[string]*entry{})
	return c
}

// lookup returns the entry of a resource, or nil.
func (c *cache) lookup(resource string) *entry { return (*c.entries.Load())[resource] }

// add returns the entry of a resource, which it makes if there is none.
func (c *cache) add(resource string) *entry {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e := c.lookup(resource); e != nil {
		return e
	}
	entries := maps.Clone(*c.entries.Load())
	e := &entry{cache: c, clock: c.clock, resource: resource, scope: resource + "/.default"}
	entries[resource] = e
	c.first.CompareAndSwap(nil, e)
	c.entries.Store(&entries)
	return e
}

// close ends all flights and timers, and waits until the issuer has returned
// from the flights.
func (c *cache) close() {
	c.mu.Lock()
	c.cancel()
	entries := *c.entries.Load()
	c.mu.Unlock()
	for _, e := range entries {
		e.shut()
	}
	c.flights.Wait()
}

// An entry keeps the token of one resource. The states that it goes through are
// not stored but follow from the token in hand, the time, and next:
//
//	empty    no token yet; a caller waits for a flight
//	fresh    before the refresh is due
//	due      after it; callers still get the token, and flights try to renew it
//	expired  a caller waits for a flight, or gets the last error between flights
type entry struct {
	cache    *cache
	clock    clock
	resource string
	scope    string // what the Azure SDK calls it

	// view is what callers get without looking further. It is all that most
	// calls touch.
	view atomic.Pointer[view]

	mu          sync.Mutex // guards what follows; never held while an issuer or a hook runs
	held        *held      // nil while empty
	flight      *flight    // the one under way, or nil
	next        instant    // when to ask next
	timer       stopper    // wakes the entry; nil if it never slept
	failures    int        // in a row
	repeats     int        // answers in a row that brought nothing new
	err         error      // of the last of them; nil if the last attempt was a success
	lastSuccess time.Time
	claims      string  // the claims challenge that was met last
	force       instant // before which no challenge forces another flight
	suspected   instant // before which no service that refuses the token forces one
}

// A view is a token and the deadline until which it can be handed out without a
// look at anything else.
type view struct {
	held  *held
	until instant
}

// A held token is one in the cache, with all that callers get of it made
// beforehand. It is immutable.
type held struct {
	oauth2    *oauth2.Token // shared by all callers
	header    string        // the value of the Authorization header
	expiry    time.Time
	refreshOn time.Time
	lifetime  time.Duration
	received  instant
	due       instant // when it is to be refreshed
	expires   instant // when nobody gets it any more
}

// get returns a token that is valid now. It waits for one only where there is
// none, until ctx is done.
func (e *entry) get(ctx context.Context) (*held, error) {
	for {
		// Thousands may come here at once when a first token has come.
		if v := e.view.Load(); v != nil && e.clock.now().before(v.until) {
			return v.held, nil
		}
		h, f, err := e.step()
		if f == nil {
			return h, err
		}
		if err := e.wait(ctx, f); err != nil {
			return nil, err
		}
	}
}

// renew is get for a caller who was refused with a claims challenge: it asks
// the issuer once for each challenge, and no more often than the gap between
// requests allows.
func (e *entry) renew(ctx context.Context, claims string) (*held, error) {
	for {
		f := e.challenge(claims)
		if f == nil {
			return e.get(ctx)
		}
		// A flight that began before the challenge came does not count.
		if err := e.wait(ctx, f); err != nil && (f.round.claims == claims || ctx.Err() != nil) {
			return nil, err
		}
	}
}

// wait returns the error of the flight, or of the caller's or the cache's end
// if that is earlier. The flight goes on whoever leaves.
func (e *entry) wait(ctx context.Context, f *flight) error {
	select {
	case <-f.done:
		return f.err
	case <-e.cache.ctx.Done():
		return e.errorf("%w", ErrClosed)
	case <-ctx.Done():
	}
	left := &leftError{ctx.Err(), context.Cause(ctx)}
	if t, ok := f.note.Load().(tried); ok {
		return e.errorf("%w while trying again after: %w", left, t.error)
	}
	return e.errorf("%w while waiting for %s", left, e.cache.issuer.source())
}

// leftError is the error of a caller whose context ended: it is the context's
// error, and reads as its cause.
type leftError struct{ err, cause error }

func (e *leftError) Error() string   { return e.cause.Error() }
func (e *leftError) Unwrap() []error { return []error{e.err, e.cause} }

// step takes the entry to where the clock says it should be, and returns what
// there is for a caller: a token, a flight to wait for, or an error.
func (e *entry) step() (*held, *flight, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed() {
		return nil, nil, e.errorf("%w", ErrClosed)
	}
	now := e.clock.now()
	e.ask(now)
	switch {
	case e.valid(now):
		return e.held, nil, nil
	case e.flight != nil:
		return nil, e.flight, nil
	default:
		return nil, nil, e.err
	}
}

// wake is called by the timer, for nobody in particular.
func (e *entry) wake() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed() {
		return
	}
	now := e.clock.now()
	e.ask(now)
	e.sleep(now)
}

// challenge returns the flight that meets a claims challenge, or nil where
// there is nothing more to be done for it.
func (e *entry) challenge(claims string) *flight {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.clock.now()
	switch {
	case e.closed():
		return nil
	case e.flight != nil:
		return e.flight
	case e.held == nil:
		if e.failures > 0 && now.before(e.next) {
			return nil
		}
		e.launch(now, round{patient: true, claims: claims})
		return e.flight
	case e.claims == claims, now.before(e.force):
		return nil
	}
	e.force = now.add(gap(e.held.lifetime))
	e.launch(now, round{held: e.held.expiry, claims: claims})
	return e.flight
}

// suspicion is how often a service that refuses a token as invalid makes us ask
// for another one: it may be the service that is wrong.
const suspicion = 5 * time.Minute

// replace returns the token to use in place of one that a service has refused, or
// nil if there is none. It waits for a flight that may bring one, until ctx is done.
func (e *entry) replace(ctx context.Context, header string) *held {
	if f := e.suspect(header); f != nil && e.wait(ctx, f) != nil {
		return nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed() || !e.valid(e.clock.now()) || e.held.header == header {
		return nil
	}
	return e.held
}

// suspect returns the flight that may bring another token than the one that a
// service has refused, or nil if there will be none, or is one already. The token
// stays in hand: other services may take it, and this one tomorrow.
func (e *entry) suspect(header string) *flight {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.clock.now()
	switch {
	case e.closed(), !e.valid(now), e.held.header != header:
		return nil
	case e.flight != nil:
		return e.flight
	case now.before(e.suspected):
		return nil
	}
	e.suspected = now.add(suspicion)
	e.launch(now, round{held: e.held.expiry, forced: true})
	return e.flight
}

// ask launches a flight if it is time for one. e.mu is held.
func (e *entry) ask(now instant) {
	valid := e.valid(now)
	// Without a token only a failure is a reason to wait.
	if e.flight != nil || now.before(e.next) && (valid || e.failures > 0) {
		return
	}
	// The first round of an outage that callers feel is a patient one, and the
	// first token is worth every patience. After that next decides: many processes
	// share one IMDS.
	r := round{patient: e.held == nil || !valid && e.failures == 0}
	if e.held != nil {
		r.held = e.held.expiry
	}
	e.launch(now, r)
}

// publish tells callers what they may have without a look at the entry: the
// token in hand until it expires or, where no flight is under way, until it is
// time for one. e.mu is held.
func (e *entry) publish() {
	if e.held == nil {
		return
	}
	until := e.held.expires
	if e.flight == nil {
		until = until.earlier(e.next)
	}
	e.view.Store(&view{e.held, until})
}

// sleep sets the timer for the next thing to do, so that a source is refreshed
// whether or not anybody asks. An entry that never had a token has nothing to
// keep fresh. e.mu is held.
func (e *entry) sleep(now instant) {
	if e.held == nil || e.flight != nil {
		return
	}
	next := now.until(e.next)
	if e.valid(now) {
		next = min(next, now.until(e.held.expires))
	}
	e.stop()
	e.timer = e.clock.afterFunc(clamp(next, time.Millisecond, maxSleep), e.wake)
}

// stop stops the timer. e.mu is held.
func (e *entry) stop() {
	if e.timer != nil {
		e.timer.Stop()
		e.timer = nil
	}
}

// shut makes a closed cache's entry hand out nothing more.
func (e *entry) shut() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.stop()
	e.view.Store(nil)
}

// valid reports whether there is a token that has not expired. e.mu is held.
func (e *entry) valid(now instant) bool {
	return e.held != nil && now.before(e.held.expires)
}

func (e *entry) closed() bool { return e.cache.ctx.Err() != nil }

// errorf is fmt.Errorf with what was tried.
func (e *entry) errorf(format string, args ...any) error {
	return fmt.Errorf("mitoken: token for %q: "+format, append([]any{e.resource}, args...)...)
}
