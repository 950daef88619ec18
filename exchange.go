package mitoken

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"
)

// This file is one try of an exchange with IMDS: on whose connection, in whose
// turn, and for how long.

const (
	dialTimeout = time.Second      // the service is on the host itself
	tryTimeout  = 10 * time.Second // for one request and the whole of its answer
)

// hostTransport makes the requests of every Credential without a transport of
// its own. IMDS must not be asked through a proxy. A connection is not kept for
// the 12 hours until the next request, nor the goroutines that go with it.
var hostTransport = &http.Transport{
	Proxy:                  nil,
	DialContext:            (&net.Dialer{Timeout: dialTimeout}).DialContext,
	DisableCompression:     true,
	DisableKeepAlives:      true,
	MaxResponseHeaderBytes: maxAnswer,
}

// hostLimiter is shared by all who ask IMDS itself: what it allows is for all the
// processes of a machine.
var hostLimiter = newLimiter()

// An exchange makes one try: in its turn, in time, and to the end of the
// answer, so that retryablehttp sees one that breaks off for what it is, a
// failure of the connection.
type exchange struct {
	base  http.RoundTripper
	limit *limiter
	began func() // is called when it is the try's turn, if not nil
}

func (x *exchange) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := x.limit.acquire(req.Context()); err != nil {
		return nil, err
	}
	defer x.limit.release()
	if x.began != nil {
		x.began()
	}
	ctx, cancel := context.WithTimeout(req.Context(), tryTimeout)
	defer cancel()
	resp, err := x.base.RoundTrip(req.WithContext(ctx))
	if err == nil {
		var body []byte
		body, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
		_ = resp.Body.Close()
		resp.Body = io.NopCloser(bytes.NewReader(body))
	}
	// Timeouts are not wrapped: they would look like that of a caller's context.
	timeout, ok := errors.AsType[net.Error](err)
	switch {
	case err == nil:
		return resp, nil
	case ctx.Err() != nil && req.Context().Err() == nil:
		return nil, fmt.Errorf("no answer within %v", tryTimeout)
	case ok && timeout.Timeout():
		return nil, errors.New(err.Error())
	}
	return nil, err
}

// A limiter lets two requests through at a time, and five in a second. IMDS
// allows a machine five at a time and 20 in a second, for all its processes.
type limiter struct {
	slots chan struct{}

	mu     sync.Mutex   // guards what follows
	starts [5]time.Time // of the last requests, a ring
	oldest int
}

func newLimiter() *limiter { return &limiter{slots: make(chan struct{}, 2)} }

// acquire waits for the turn of a request. Unless it fails, release is due.
func (l *limiter) acquire(ctx context.Context) error {
	select {
	case l.slots <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	timer := time.NewTimer(l.book())
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		l.release()
		return ctx.Err()
	}
}

func (l *limiter) release() { <-l.slots }

// book returns how long a request has to wait so that it starts a second after
// the fifth one before it.
func (l *limiter) book() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	start := l.starts[l.oldest].Add(time.Second)
	if start.Before(now) {
		start = now
	}
	l.starts[l.oldest] = start
	l.oldest = (l.oldest + 1) % len(l.starts)
	return start.Sub(now)
}
