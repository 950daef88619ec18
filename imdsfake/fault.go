package imdsfake

import (
	"context"
	"net"
	"net/http"
	"os"
	"slices"
	"syscall"
	"time"
)

// A Fault is something that goes wrong with requests for tokens. Keys and
// discovery stay as they are: services read them from elsewhere.
type Fault struct {
	// Times is how many requests it befalls. If zero, it is all of them until
	// For is over.
	Times int

	// For is how long it lasts, from [Handler.Inject] on. If zero, and Times is
	// zero, it lasts until [Handler.Clear].
	For time.Duration

	// Latency is waited before anything else. A Fault with nothing but that
	// makes a request slow, not fail.
	Latency time.Duration

	// Status is the HTTP status code to answer with. If zero, and Failure is
	// empty, the request is answered as ever.
	Status int

	// Body is the body to answer with. If empty, it is an error as IMDS writes
	// it. It is ignored if Status is zero.
	Body string

	// RetryAfter is the Retry-After header of the answer, if not empty. It is
	// ignored if Status is zero.
	RetryAfter string

	// Failure is what becomes of the connection, if not empty.
	Failure Failure
}

// A Failure is what can become of a connection.
type Failure string

const (
	// Refuse: nobody accepts the connection. This is so for a Handler used as a
	// transport and for [Server.Client]; another client of a Server finds its
	// connection reset.
	Refuse Failure = "refuse"

	// Reset: the connection is reset before there is an answer.
	Reset Failure = "reset"

	// Truncate: the connection breaks off in the middle of the body.
	Truncate Failure = "truncate"

	// Hang: there is no answer, until the client gives up or the Server is
	// closed.
	Hang Failure = "hang"
)

// Inject adds faults to the script. The first one that has not run out befalls a
// request.
func (h *Handler) Inject(faults ...Fault) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, f := range faults {
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

// scripted is a fault in the script.
type scripted struct {
	Fault
	left int       // requests, if Times is not zero
	end  time.Time // zero if it has none
}

func (s *scripted) over(now time.Time) bool {
	return s.Times > 0 && s.left == 0 || !s.end.IsZero() && !now.Before(s.end)
}

// fault returns the fault that befalls the next request for a token, and counts
// it if the condition holds.
func (h *Handler) fault(condition func(Fault) bool) (Fault, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	h.faults = slices.DeleteFunc(h.faults, func(s *scripted) bool { return s.over(now) })
	if len(h.faults) == 0 || !condition(h.faults[0].Fault) {
		return Fault{}, false
	}
	h.faults[0].left--
	return h.faults[0].Fault, true
}

// refuse returns the error of a dial, if that is what befalls a request.
func (h *Handler) refuse(r *http.Request) error {
	if r.URL.Path != tokenPath {
		return nil
	}
	f, ok := h.fault(func(f Fault) bool { return f.Failure == Refuse })
	if !ok {
		return nil
	}
	entry := Request{Time: time.Now(), Method: r.Method, Path: r.URL.Path,
		Resource: r.URL.Query().Get("resource"), UserAgent: r.UserAgent(), Error: string(Refuse)}
	h.record(entry)
	if err := sleep(r.Context(), f.Latency); err != nil {
		return err
	}
	return &net.OpError{Op: "dial", Net: "tcp", Addr: address(r.URL.Host),
		Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
}

var errReset = &net.OpError{Op: "read", Net: "tcp",
	Err: os.NewSyscallError("read", syscall.ECONNRESET)}

// address is a [net.Addr] for the text of an error.
type address string

func (address) Network() string  { return "tcp" }
func (a address) String() string { return string(a) }

// befall makes a request wait, and returns the answer that a fault has for it.
func (f Fault) befall(r *http.Request) (answer, bool) {
	if sleep(r.Context(), f.Latency) != nil {
		return answer{failure: Hang}, true // the client has left
	}
	if f.Failure == Hang {
		<-r.Context().Done()
	}
	switch {
	case f.Status != 0:
		a := refusal(f.Status, "fault", "A fault was injected")
		if f.Body != "" {
			a.body = []byte(f.Body)
		}
		if f.RetryAfter != "" {
			a.header.Set("Retry-After", f.RetryAfter)
		}
		a.failure = f.Failure
		return a, true
	case f.Failure == "" || f.Failure == Truncate:
		return answer{}, false
	}
	return answer{failure: f.Failure}, true
}

// sleep waits for d, or until ctx is done, which is its error.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// reset closes the connection of a request without an answer, with a RST where
// it can.
func reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}
