package mitoken

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"time"
)

// An Event is one attempt to get a token, as [Credential.Observe] is told of
// it. The tries of an attempt that is retried are one event. It never holds a
// token.
type Event struct {
	Resource string        // whom the token is for
	Source   string        // who was asked: see Status.Source
	Start    time.Time     // when the attempt began
	Duration time.Duration // how long it took, retries and waiting included
	Err      error         // why it failed; nil if it did not
	Expiry   time.Time     // when the token in hand expires; zero if there is none
	New      bool          // whether this attempt brought it; false if the same token came again
}

// Status is the state of a [TokenSource] at one time, for a health page (it
// encodes as JSON) and for gauges. It never holds a token.
type Status struct {
	// State is "empty" before the first token, "fresh" until its refresh falls
	// due, "due" until it expires, then "expired", and "closed" after
	// [Credential.Close]. While it is fresh or due, callers get the token,
	// whatever the other fields say.
	State string `json:"state"`

	// Source is who issues the tokens: "imds", or the service of another kind of
	// host, which is one of "appservice", "azureml", "cloudshell", "azurearc",
	// "servicefabric" and "workloadidentity", or the kind of the credential that
	// is Upstream or Fallback; "none" on a host that cannot be used, of which
	// LastError says why.
	Source string `json:"source"`

	// Expiry and RefreshOn are when the token in hand expires and when its
	// refresh falls due. Both are zero if there is none.
	Expiry    time.Time `json:"expiry,omitzero"`
	RefreshOn time.Time `json:"refresh_on,omitzero"`

	// LastSuccess is when an attempt last brought a valid token, a new one or the
	// same.
	LastSuccess time.Time `json:"last_success,omitzero"`

	// Failures counts the failed attempts since, and LastError is the text of
	// the last of them.
	Failures  int    `json:"failures"`
	LastError string `json:"last_error,omitempty"`

	// Repeats counts the answers in a row that brought the token in hand again, or
	// an older one. If it is not zero while State is "due", whoever issues tokens
	// keeps them in a cache that nothing gets past, as IMDS may, and as the
	// credential of the Azure CLI does: there is nothing to refresh early.
	Repeats int `json:"repeats"`

	// Survives is how long an outage of the issuer that began now would cost no
	// caller an error. In JSON it is in nanoseconds.
	Survives time.Duration `json:"survives_ns"`
}

// status returns the state of the entry.
func (e *entry) status() Status {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.clock.now()
	s := Status{
		State:       "empty",
		Source:      e.cache.issuer.source(),
		LastSuccess: e.lastSuccess,
		Failures:    e.failures,
		Repeats:     e.repeats,
	}
	if e.err != nil {
		s.LastError = e.err.Error()
	}
	if h := e.held; h != nil {
		s.Expiry, s.RefreshOn = h.expiry, h.refreshOn
		s.Survives = max(0, now.until(h.expires))
		switch {
		case s.Survives == 0:
			s.State = "expired"
		case now.before(h.due):
			s.State = "fresh"
		default:
			s.State = "due"
		}
	}
	if e.closed() {
		s.State, s.Survives = "closed", 0
	}
	return s
}

// A report is an event with what the log wants to know beside it.
type report struct {
	Event
	failures int // in a row, before this event
}

// tell lets the hooks know of an attempt. One that panics harms nobody.
func (c *cache) tell(r report) {
	c.guard(func() { c.log(r) })
	if c.observe != nil {
		c.guard(func() { c.observe(r.Event) })
	}
}

// log writes what an operator can act on: where tokens come from, the first
// failure of a row, and its end.
func (c *cache) log(r report) {
	if c.logger == nil {
		return
	}
	log := c.logger.With("resource", r.Resource, "source", r.Source)
	switch {
	case r.Err == nil && r.failures > 0:
		log.Info("mitoken: tokens are issued again", "failures", r.failures, "expiry", r.Expiry)
	case r.Err == nil && !c.named.Swap(true):
		log.Info("mitoken: tokens are issued", "expiry", r.Expiry)
	case r.Err != nil && r.failures == 0 && r.Expiry.IsZero():
		log.Warn("mitoken: no token", "error", r.Err)
	case r.Err != nil && r.failures == 0:
		log.Warn("mitoken: token not refreshed", "error", r.Err, "expiry", r.Expiry)
	}
}

// guard calls a function that is not ours, and lets no panic of it out.
func (c *cache) guard(f func()) {
	defer func() {
		if p := recover(); p != nil {
			c.logPanic(p, debug.Stack())
		}
	}()
	f()
}

// logPanic logs where a panic was.
func (c *cache) logPanic(p any, stack []byte) {
	if c.logger != nil {
		defer func() { _ = recover() }() // it may be the logger that panics
		c.logger.Error("mitoken: recovered", "error", panicError(p), "stack", string(stack))
	}
}

// panicError returns a panic as an error. The value is not shown, unless it is
// the runtime's own: it could hold a token.
func panicError(p any) error {
	if r, ok := p.(runtime.Error); ok {
		return fmt.Errorf("panic: %w", r)
	}
	return fmt.Errorf("panic of type %T", p)
}
