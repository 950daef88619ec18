package imdsfake

import (
	"context"
	"slices"
	"time"
)

// A Request is an entry of the journal. It never holds a token or a secret.
type Request struct {
	Time      time.Time `json:"time"` // when it came
	Host      Host      `json:"host,omitempty"`
	Method    string    `json:"method"`
	Path      string    `json:"path"`
	Resource  string    `json:"resource,omitempty"` // whom the token was to be for
	Identity  string    `json:"identity,omitempty"` // as asked for, such as "client_id=..."; empty for the default one
	UserAgent string    `json:"userAgent,omitempty"`
	Status    int       `json:"status"`             // of the answer; 0 if a fault left it without one
	Error     string    `json:"error,omitempty"`    // the code of an error answer, or the name of the Failure
	ClientID  string    `json:"clientId,omitempty"` // of the identity that got a token
	Reason    string    `json:"reason"`             // why it was answered so, in words
}

// journalSize is how many requests the journal keeps. A test that needs more
// counts them itself.
const journalSize = 100_000

// journal holds the last requests, and tells those who wait for more.
type journal struct {
	requests []Request
	waiting  map[chan struct{}]bool // each closed with the next one
}

// journalize writes down what a request gets, once.
func (h *Handler) journalize(c *call, r Request) {
	if !c.again {
		h.record(r)
	}
}

func (h *Handler) record(r Request) {
	h.mu.Lock()
	defer h.mu.Unlock()
	j := &h.journal
	if len(j.requests) >= 2*journalSize {
		j.requests = slices.Clone(j.requests[journalSize:])
	}
	j.requests = append(j.requests, r)
	for arrived := range j.waiting {
		close(arrived)
	}
	clear(j.waiting)
}

// Requests returns the journal, oldest first: the last 100,000 requests. An entry
// is written once it is known what the request gets.
func (h *Handler) Requests() []Request {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.journal.last()
}

func (j *journal) last() []Request {
	return slices.Clone(j.requests[max(0, len(j.requests)-journalSize):])
}

// WaitFor waits until the journal has n requests for which match is true, and
// returns them; n is at most the 100,000 that it keeps. If match is nil, all count.
// If ctx is done first, it returns those that there are, and the context's error.
func (h *Handler) WaitFor(ctx context.Context, n int, match func(Request) bool) ([]Request, error) {
	for {
		found, arrived := h.await(n, match)
		if arrived == nil {
			return found, nil
		}
		select {
		case <-arrived:
		case <-ctx.Done():
			h.mu.Lock()
			defer h.mu.Unlock()
			delete(h.journal.waiting, arrived)
			return found, ctx.Err()
		}
	}
}

// await returns the requests that match and, if they are fewer than n, what tells
// of the next one. Each waiter has a channel of its own, since one may be in a
// testing/synctest bubble, and another not.
func (h *Handler) await(n int, match func(Request) bool) (found []Request, arrived chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	found = h.journal.last()
	if match != nil {
		found = slices.DeleteFunc(found, func(r Request) bool { return !match(r) })
	}
	if len(found) >= n {
		return found, nil
	}
	if h.journal.waiting == nil {
		h.journal.waiting = map[chan struct{}]bool{}
	}
	arrived = make(chan struct{})
	h.journal.waiting[arrived] = true
	return found, arrived
}

// A Token is one that was issued, but for what makes it one: its signature.
type Token struct {
	Resource string         `json:"resource"`
	ClientID string         `json:"clientId"` // of the identity
	Issued   time.Time      `json:"issued"`
	Expiry   time.Time      `json:"expiry"`
	Claims   map[string]any `json:"claims"` // must not be changed
}

// tokensKept is how many tokens Tokens returns.
const tokensKept = 1000

// Tokens returns the last 1,000 tokens that were issued, oldest first.
func (h *Handler) Tokens() []Token {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.tokens[max(0, len(h.tokens)-tokensKept):])
}
