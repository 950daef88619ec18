package imdsfake

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"time"
)

// A Fault is something that goes wrong with requests to the metadata service, or
// to what a host has in its place, or to Entra's token endpoint. Keys, discovery
// and Microsoft Graph stay as they are: services read them from elsewhere.
type Fault struct {
	// Times is how many requests it befalls. If zero, it is all of them until
	// For is over.
	Times int `json:"times,omitempty"`

	// For is how long it lasts, from [Handler.Inject] on. If zero, and Times is
	// zero, it lasts until [Handler.Clear].
	For time.Duration `json:"for,omitempty"`

	// Probability is that with which it befalls a request. If zero, it is 1.
	Probability float64 `json:"probability,omitempty"`

	// Identity is whose tokens it befalls: a name, or one of the IDs. If empty,
	// it is everybody's.
	Identity string `json:"identity,omitempty"`

	// Resource is for whom the tokens are that it befalls: an App ID URI or a
	// client ID. If empty, it is whoever.
	Resource string `json:"resource,omitempty"`

	// Latency is waited before anything else. A Fault with nothing but that
	// makes a request slow, not fail.
	Latency time.Duration `json:"latency,omitempty"`

	// Jitter is the most that is added to Latency, at random.
	Jitter time.Duration `json:"jitter,omitempty"`

	// Status is the HTTP status code to answer with. If zero, the request is
	// answered as ever, but for what the fields below change. 410 for 70 seconds
	// is an upgrade of IMDS.
	Status int `json:"status,omitempty"`

	// Body is the body to answer with, in place of the one that there would be.
	// If it is empty and Status is not zero, the body is an error as the service
	// writes it.
	Body string `json:"body,omitempty"`

	// Header is added to that of the answer, in place of what it has: a
	// Content-Type, say. An empty value takes a header away.
	Header map[string]string `json:"header,omitempty"`

	// RetryAfter is the Retry-After header of the answer, if not empty.
	RetryAfter string `json:"retryAfter,omitempty"`

	// Fields replace those of a JSON answer: {"token_type": "mac"}, say. A nil
	// value takes a field away.
	Fields map[string]any `json:"fields,omitempty"`

	// Gzip compresses the body, whether or not the client can read that.
	Gzip bool `json:"gzip,omitempty"`

	// Pad is how many spaces follow the body, to make it too large.
	Pad int `json:"pad,omitempty"`

	// Drip is waited before each byte of the body.
	Drip time.Duration `json:"drip,omitempty"`

	// Failure is what becomes of the connection, if not empty.
	Failure Failure `json:"failure,omitempty"`

	// After is how many bytes of the body arrive before it breaks off, with
	// Truncate and ResetBody. If zero, it is half of them; if negative, none.
	After int `json:"after,omitempty"`
}

// A Failure is what can become of a connection.
type Failure string

const (
	// Refuse: nobody accepts the connection. This is so for a Handler used as a
	// transport and for [Server.Client]; another client of a Server finds its
	// connection reset.
	Refuse Failure = "refuse"

	// Reset: the connection is reset before there is an answer. A client other than
	// [Server.Client] may send a request again by itself if its connection was a
	// kept one: net/http does.
	Reset Failure = "reset"

	// ResetBody: the connection is reset in the middle of the body.
	ResetBody Failure = "reset-body"

	// Truncate: the connection is closed in the middle of the body.
	Truncate Failure = "truncate"

	// Hang: there is no answer, until the client gives up or the Server is
	// closed.
	Hang Failure = "hang"

	left Failure = "left" // the client has
)

var failures = []Failure{"", Refuse, Reset, ResetBody, Truncate, Hang}

// Check returns what is wrong with a Fault, which would panic in Inject. The
// error begins with the name of the field.
func (f Fault) Check() error {
	switch {
	case f.Times < 0:
		return fmt.Errorf("times: %d is negative", f.Times)
	case f.For < 0:
		return fmt.Errorf("for: %v is negative", f.For)
	case !(f.Probability >= 0 && f.Probability <= 1):
		return fmt.Errorf("probability: %v is not between 0 and 1", f.Probability)
	case f.Latency < 0:
		return fmt.Errorf("latency: %v is negative", f.Latency)
	case f.Jitter < 0:
		return fmt.Errorf("jitter: %v is negative", f.Jitter)
	case f.Drip < 0:
		return fmt.Errorf("drip: %v is negative", f.Drip)
	case f.Pad < 0 || f.Pad > 1<<30:
		return fmt.Errorf("pad: %d is not between 0 and 1 GiB", f.Pad)
	case f.Status != 0 && (f.Status < 200 || f.Status > 999):
		return fmt.Errorf("status: %d is not between 200 and 999", f.Status)
	case f.idle():
		return errors.New("it has no effect: neither latency, status, body, header, fields nor failure")
	case !slices.Contains(failures, f.Failure):
		return fmt.Errorf("failure: %q is none of %q", f.Failure, failures[1:])
	}
	for name := range f.Header {
		switch http.CanonicalHeaderKey(name) {
		case "Content-Length", "Transfer-Encoding":
			return fmt.Errorf("header: %s is the connection's own: see truncate and pad", name)
		}
	}
	if _, err := json.Marshal(f.Fields); err != nil {
		return fmt.Errorf("fields: %w", err)
	}
	return nil
}

// idle tells whether a fault does nothing, but keep others from befalling.
func (f Fault) idle() bool {
	return f.Status == 0 && f.Latency == 0 && f.Jitter == 0 && f.Drip == 0 && f.Failure == "" && !f.garbles()
}

// Inject adds faults to the script. The first one that is for a request, and has
// not run out, befalls it. It panics if a fault makes no sense, which
// [Fault.Check] tells.
func (h *Handler) Inject(faults ...Fault) {
	for _, f := range faults {
		if err := f.Check(); err != nil {
			panic("imdsfake: fault: " + err.Error())
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, f := range faults {
		f.Fields, f.Header = maps.Clone(f.Fields), maps.Clone(f.Header)
		s := &scripted{Fault: f, left: f.Times}
		if f.For > 0 {
			s.end = time.Now().Add(f.For)
		}
		h.faults = append(h.faults, s)
	}
}

// Clear ends all faults. Requests that a fault keeps waiting are not released.
func (h *Handler) Clear() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.faults = nil
}

// Faults returns the script: the faults that have not run out, with what is left
// of Times and For.
func (h *Handler) Faults() []Fault {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	h.forget(now)
	var faults []Fault
	for _, s := range h.faults {
		f := s.Fault
		f.Fields, f.Header = maps.Clone(f.Fields), maps.Clone(f.Header)
		f.Times = s.left
		if f.For > 0 {
			f.For = s.end.Sub(now)
		}
		faults = append(faults, f)
	}
	return faults
}

// forget removes the faults that have run out. h.mu is held.
func (h *Handler) forget(now time.Time) {
	h.faults = slices.DeleteFunc(h.faults, func(s *scripted) bool {
		return s.Times > 0 && s.left == 0 || !s.end.IsZero() && !now.Before(s.end)
	})
}

// scripted is a fault in the script.
type scripted struct {
	Fault
	left int       // requests, if Times is not zero
	end  time.Time // zero if it has none
}

// A draw is a fault that a request of [Server.Client] has drawn on its way.
type draw struct {
	fault Fault
	from  *scripted // nil if there is none
	seen  bool      // the request has arrived, guarded by Handler.mu
}

// drawn returns the fault of a request, which it may have drawn on its way. If
// net/http sends it again, because its connection was reset, it is the same one.
func (h *Handler) drawn(c *call) Fault {
	d, ok := h.drawns.Load(c.Header.Get(ticketHeader))
	if !ok {
		f, _ := h.draw(c)
		return f
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	c.again, d.(*draw).seen = d.(*draw).seen, true
	return d.(*draw).fault
}

// putBack has a fault that a request has drawn befall another one.
func (h *Handler) putBack(c *call) {
	if d, ok := h.drawns.Load(c.Header.Get(ticketHeader)); ok && d.(*draw).from != nil {
		h.mu.Lock()
		defer h.mu.Unlock()
		d.(*draw).from.left++
	}
}

// draw returns the fault that befalls a request, and counts it; the zero Fault if
// there is none.
func (h *Handler) draw(c *call) (Fault, *scripted) {
	if c.entry.Host == "" {
		return Fault{}, nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.forget(time.Now())
	for _, s := range h.faults {
		if !h.isFor(s.Fault, c) || s.Probability > 0 && rand.Float64() >= s.Probability {
			continue
		}
		if s.Times > 0 {
			s.left--
		}
		return s.Fault, s
	}
	return Fault{}, nil
}

// isFor tells whether a fault is for the resource and the identity of a request.
func (h *Handler) isFor(f Fault, c *call) bool {
	if f.Resource != "" && !h.tenant.sameResource(f.Resource, c.entry.Resource) {
		return false
	}
	if f.Identity == "" {
		return true
	}
	if c.protocol == nil {
		return false
	}
	if c.protocol == entra {
		sp, ok := h.tenant.client(c.query.get("client_id"))
		return ok && sp.identity().is(f.Identity)
	}
	id, text := h.tenant.identity(c.selector, c.query.get(c.selector))
	return text == "" && id.is(f.Identity)
}

// ticketHeader is of a request of [Server.Client], whose fault has been drawn
// already: it has to be known whether there is a connection at all.
const ticketHeader = "Imdsfake-Ticket"
