// Outages shows what an outage of the metadata service costs the callers of
// mitoken and of its peers:
//
//	cd benchmarks && go run ./outages
//
// Each is given the same work, in simulated time: tokens that live for 24 hours,
// from the same fake metadata service, and a call a minute with a deadline of
// 30 s, until an hour after the outage. The outage begins at any time of the life
// of the first token. What is printed is measured in that run, as Markdown.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net/url"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aztoso/mitoken/imdsfake"
)

const (
	day      = 24 * time.Hour
	every    = time.Minute      // a call
	patience = 30 * time.Second // of a call
	after    = time.Hour        // that is looked at when the outage is over

	trial = 4 * day // that one takes at most, and the tokens that it leaves behind
)

var lengths = []time.Duration{
	time.Minute, 10 * time.Minute, time.Hour, 6 * time.Hour, 12 * time.Hour,
}

func main() {
	testing.Init()
	quick := flag.Bool("quick", false, "try few outages: every 3 hours, not every 10 minutes")
	kind := flag.String("kind", "refuse", "what the service does meanwhile: `refuse`, hang, or 503")
	flag.Parse()
	faults := map[string]imdsfake.Fault{
		"refuse": {Failure: imdsfake.Refuse}, "hang": {Failure: imdsfake.Hang}, "503": {Status: 503},
	}
	fault, ok := faults[*kind]
	if !ok || flag.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "usage: outages [-quick] [-kind refuse|hang|503]")
		os.Exit(2)
	}
	apart := 10 * time.Minute
	if *quick {
		apart = 3 * time.Hour
	}
	// Simulated time needs a test to run in. What that has to say is no table.
	out := os.Stdout
	os.Stdout = os.Stderr
	testing.Main(func(string, string) (bool, error) { return true, nil }, []testing.InternalTest{{
		Name: "outages",
		F: func(t *testing.T) {
			results := measure(t, fault, apart)
			if t.Failed() {
				return
			}
			write(out, *kind, apart, results)
			os.Stdout = nil // Main would write PASS
		},
	}}, nil, nil)
}

// A key is what a row and a column of the table are about.
type key struct {
	contestant string
	length     time.Duration
}

// A result is what outages of one length cost the callers of one contestant.
type result struct {
	outages int           // that begin at regular intervals
	felt    int           // of which a call failed in
	failed  int           // calls, in the worst of all
	longest time.Duration // that a call took, in any of all
}

// A start is when an outage begins, in the life of the first token.
type start struct {
	at    time.Duration
	extra bool // one that is not at a regular interval
}

// starts returns those that are tried: at regular intervals, and each minute of the
// last ten of a token's life, and of the first half of it. It is then that the next
// token falls due, at the latest: with the others, and with mitoken. So that is where
// the worst is, and intervals of any length would step over it. All are half a minute
// past, so that no outage begins or ends with a call.
func starts(apart time.Duration) (all []start) {
	for at := every / 2; at < day; at += apart {
		all = append(all, start{at: at})
	}
	for _, end := range []time.Duration{day / 2, day} {
		for at := end - 10*time.Minute + every/2; at < end; at += every {
			all = append(all, start{at: at, extra: true})
		}
	}
	return all
}

// measure tries all outages.
func measure(t *testing.T, fault imdsfake.Fault, apart time.Duration) map[key]result {
	results := map[key]result{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, c := range contestants {
		wg.Go(func() {
			for _, length := range lengths {
				r := c.try(t, fault, apart, length)
				mu.Lock()
				results[key{c.name, length}] = r
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return results
}

// try tries the outages of one length.
func (c *contestant) try(t *testing.T, fault imdsfake.Fault, apart, length time.Duration) result {
	var r result
	for _, s := range starts(apart) {
		failed, longest := c.suffer(t, fault, s.at, length)
		r.failed, r.longest = max(r.failed, failed), max(r.longest, longest)
		if s.extra {
			continue
		}
		r.outages++
		if failed > 0 {
			r.felt++
		}
	}
	return r
}

// suffer tries one outage, and returns how many calls failed in it and how long
// the longest one took. The first call, which has to wait in any case, does not
// count.
//
// MSAL's cache is that of the process, and every bubble begins at the same time. So
// a trial begins when the tokens of those before it have expired. A resource of its
// own would do, too, but that cache is searched from end to end.
func (c *contestant) suffer(t *testing.T, fault imdsfake.Fault, start, length time.Duration) (
	failed int, longest time.Duration,
) {
	gap := time.Duration(c.trials) * trial
	c.trials++
	fault.For = length
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(gap)
		begin := time.Now()
		fake := &imdsfake.Handler{Cache: imdsfake.NoCache}
		call, stop := c.start(t, fake, "api://"+url.PathEscape(c.name))
		defer stop()
		if _, err := timed(call); err != nil {
			t.Fatalf("%s: the first call: %v", c.name, err)
		}
		time.AfterFunc(start, func() { fake.Inject(fault) })
		for next := every; next <= start+length+after; next += every {
			time.Sleep(time.Until(begin.Add(next)))
			took, err := timed(call)
			if err != nil {
				failed++
			}
			longest = max(longest, took)
		}
	})
	return failed, longest
}

// timed makes a call, and returns how long it took.
func timed(call call) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	begin := time.Now()
	err := call(ctx)
	return time.Since(begin), err
}

// write writes the tables.
func write(w io.Writer, kind string, apart time.Duration, results map[key]result) {
	fmt.Fprintf(w, "The metadata service fails (%s) for a while, beginning at any time of a "+
		"token's life (every %s). In how many of these outages calls fail:\n\n", kind, short(apart))
	table(w, results, result.share)
	fmt.Fprintf(w, "\nIn the worst of them, and of those that begin in each of the last ten "+
		"minutes of the token's life, and of the first half of it: how many calls fail, of one "+
		"a minute, and how long the longest takes:\n\n")
	table(w, results, result.worst)
	fmt.Fprintf(w, "\nMeasured on %s with %s, %s.\n",
		time.Now().Format(time.DateOnly), runtime.Version(), strings.Join(versions(), ", "))
}

// table writes one table, with a row for each length of an outage.
func table(w io.Writer, results map[key]result, cell func(result) string) {
	head, rule := "| outage |", "|---|"
	for _, c := range contestants {
		head += " " + c.name + " |"
		rule += "---|"
	}
	fmt.Fprintf(w, "%s\n%s\n", head, rule)
	for _, length := range lengths {
		row := fmt.Sprintf("| %s |", short(length))
		for _, c := range contestants {
			row += " " + cell(results[key{c.name, length}]) + " |"
		}
		fmt.Fprintln(w, row)
	}
}

func (r result) share() string {
	return fmt.Sprintf("%d of %d", r.felt, r.outages)
}

func (r result) worst() string {
	calls := "calls"
	if r.failed == 1 {
		calls = "call"
	}
	return fmt.Sprintf("%d %s; %s", r.failed, calls, short(r.longest))
}

// short is a duration without the parts of it that are zero.
func short(d time.Duration) string {
	s := d.Round(time.Millisecond).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// versions names those of the contestants.
func versions() (names []string) {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return nil
	}
	for _, m := range info.Deps {
		for _, name := range []string{
			"x/oauth2", "azidentity", "azcore", "microsoft-authentication-library-for-go",
		} {
			if strings.HasSuffix(m.Path, "/"+name) {
				names = append(names, name+" "+m.Version)
			}
		}
	}
	return names
}
