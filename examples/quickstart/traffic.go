package main

import (
	"io"
	"net/http"
	"sync"
	"time"
)

// drain reads a response to its end, so that its connection is used again.
func drain(resp *http.Response) error {
	_, err := io.Copy(io.Discard, resp.Body)
	return err
}

// A tally is what became of many calls.
type tally struct {
	mu      sync.Mutex // guards what follows
	calls   int
	failed  int
	err     error // of the first that failed
	slowest time.Duration
}

// time makes a call, and counts it.
func (t *tally) time(call func() error) {
	start := time.Now()
	err := call()
	took := time.Since(start)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.calls++
	t.slowest = max(t.slowest, took)
	if err != nil {
		t.failed++
		if t.err == nil {
			t.err = err
		}
	}
}

// burst makes n calls, as fast as a number of goroutines can.
func burst(n, goroutines int, call func() error) *tally {
	var t tally
	var wg sync.WaitGroup
	for range goroutines {
		wg.Go(func() {
			for range n / goroutines {
				t.time(call)
			}
		})
	}
	wg.Wait()
	return &t
}

// startTraffic makes a call in each interval until stop is called, which returns
// what became of them. It does not wait for one before it makes the next, so that
// a slow one hides none that would have been slow as well.
func startTraffic(interval time.Duration, call func() error) (stop func() *tally) {
	var t tally
	var wg sync.WaitGroup
	quit := make(chan struct{})
	wg.Go(func() {
		ticker := time.NewTicker(interval)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				wg.Go(func() { t.time(call) })
			case <-quit:
				return
			}
		}
	})
	return sync.OnceValue(func() *tally {
		close(quit)
		wg.Wait()
		return &t
	})
}
