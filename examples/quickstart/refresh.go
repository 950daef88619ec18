package main

import (
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/aztoso/mitoken"
	"github.com/aztoso/mitoken/imdsfake"
)

// The tokens of steps 5 and 6 live for seconds, as nobody waits for 24 hours to
// see one refreshed. The rule is the same; only the pauses between tries are
// shorter, 1 s instead of 30 s. So an outage has to end that much before a token
// expires, and half a lifetime less a second is what 12 s leave.
const (
	shortLife = 12 * time.Second
	outage    = 5 * time.Second
	lead      = time.Second // from the begin of the outage to the refresh that it spoils

	interval = 20 * time.Millisecond // between calls
	patience = 2 * time.Second       // no call may take longer, on however busy a machine
)

// endure lets a daemon live through a refresh, and then through an outage.
func endure(_ *site, r *report) error {
	s, err := newSite(shortLife)
	if err != nil {
		return err
	}
	defer s.close()
	events := make(chan mitoken.Event, 100) // Observe must not be slow, so never full
	cred := mitoken.Credential{
		Endpoint: s.imds.URL,
		Observe:  func(e mitoken.Event) { events <- e },
	}
	defer cred.Close()
	src := cred.TokenSource(resource)
	d := &daemon{site: s, source: src, client: s.client(src), events: events}
	if err := d.refresh(r); err != nil {
		return err
	}
	return d.outage(r)
}

// A daemon is one that calls all the time.
type daemon struct {
	site   *site
	source *mitoken.TokenSource
	client *http.Client
	events <-chan mitoken.Event
}

// start starts its calls. They end when stop is called, which counts them.
func (d *daemon) start() (stop func() *tally) {
	return startTraffic(interval, func() error { return d.site.call(d.client) })
}

// refresh tells how the first token is replaced.
func (d *daemon) refresh(r *report) error {
	r.headline("A token is replaced when 40 to 50 %% of its life is over (wait %.0f s)",
		(shortLife / 2).Seconds())
	if err := d.site.call(d.client); err != nil { // the only one that may wait, for its token
		return err
	}
	stop := d.start()
	defer stop()
	first, err := d.next()
	if err != nil {
		return err
	}
	issued := first.Expiry.Add(-shortLife)
	r.at(time.Since(issued), "a token for %.0f s; from now on %d calls a second",
		shortLife.Seconds(), time.Second/interval)
	second, err := d.next()
	if err != nil {
		return err
	}
	age := second.Start.Sub(issued)
	share := 100 * age.Seconds() / shortLife.Seconds()
	r.at(age, "replaced in the background, at %.0f %% of its life", share)
	if share < 39 || share > 60 { // 40 to 50, as far as a busy machine can tell
		return fmt.Errorf("the token was replaced at %.0f %% of its life", share)
	}
	return judge(r, stop())
}

// next returns the attempt that brings the next token. None may fail before it.
func (d *daemon) next() (mitoken.Event, error) {
	late := time.After(shortLife)
	for {
		select {
		case e := <-d.events:
			if e.New || e.Err != nil {
				return e, e.Err
			}
		case <-late:
			return mitoken.Event{}, fmt.Errorf("no new token in %v", shortLife)
		}
	}
}

// outage tells how a refresh fails until the metadata service is back.
func (d *daemon) outage(r *report) error {
	r.headline("The metadata service fails when the next is due (wait %.0f s)",
		(shortLife/2 + outage).Seconds())
	stop := d.start()
	defer stop()
	status := d.source.Status()
	time.Sleep(time.Until(status.RefreshOn.Add(-lead)))
	d.site.azure.Inject(imdsfake.Fault{For: time.Hour, Failure: imdsfake.Refuse})
	age := time.Since(status.Expiry.Add(-shortLife))
	r.at(age, "the metadata service goes down, for %.0f s", outage.Seconds())
	failures, err := d.rideOut(r, status.Expiry)
	switch {
	case err != nil:
		return err
	case failures == 0:
		return errors.New("no refresh fell into the outage")
	}
	return judge(r, stop())
}

// rideOut tells what becomes of a token in an outage, until it is replaced. It
// returns how many refreshes failed meanwhile.
func (d *daemon) rideOut(r *report, expiry time.Time) (failures int, err error) {
	issued := expiry.Add(-shortLife)
	back, late := time.After(outage), time.After(time.Until(expiry))
	for down := true; ; {
		select {
		case e := <-d.events:
			age := e.Start.Sub(issued)
			switch {
			case e.Err != nil:
				failures++
				r.at(age, "a refresh fails, the calls go on")
			case e.New && down:
				return failures, errors.New("the metadata service was down, and issued a token")
			case e.New:
				r.at(age, "replaced, after %d failures that no call has seen", failures)
				return failures, nil
			}
		case <-back:
			down = false
			d.site.azure.Clear()
			r.at(time.Since(issued), "it is back; the token has %.1f s left",
				time.Until(expiry).Seconds())
		case <-late:
			return failures, errors.New("the token has expired")
		}
	}
}

// judge tells what became of the calls, and returns an error if one of them has
// felt anything of what went on behind it.
func judge(r *report, t *tally) error {
	r.fact("calls", "%d, %d failed, the slowest took %d ms", t.calls, t.failed,
		t.slowest.Milliseconds())
	switch {
	case t.failed > 0:
		return fmt.Errorf("%d of %d calls failed, the first: %w", t.failed, t.calls, t.err)
	case t.slowest > patience:
		return fmt.Errorf("a call took %v", t.slowest)
	}
	return nil
}
