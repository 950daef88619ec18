// Outages shows what an outage of the metadata service costs the callers of
// mitoken and of its peers:
//
//	cd benchmarks && go run ./outages
//
// Each is given the same work, in simulated time: tokens that live for 24 hours,
// from the same fake metadata service, and a call a minute with a deadline of
// 30 s. The outage begins at any time of the life of the first token. What is
// printed is measured in that run, as Markdown.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
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
)

var lengths = []time.Duration{time.Minute, 10 * time.Minute, time.Hour, 6 * time.Hour, 12 * time.Hour}

func main() {
	testing.Init()
	apart := flag.Duration("apart", 10*time.Minute,
		"`time` between the beginnings of the outages that are tried")
	kind := flag.String("kind", "refuse",
		"what the service does meanwhile: `refuse`, hang, or 503")
	flag.Parse()
	faults := map[string]imdsfake.Fault{
		"refuse": {Failure: imdsfake.Refuse}, "hang": {Failure: imdsfake.Hang}, "503": {Status: 503},
	}
	fault, ok := faults[*kind]
	if !ok || *apart <= 0 {
		fmt.Fprintln(os.Stderr, "outages: -kind is refuse, hang or 503, and -apart more than nothing")
		os.Exit(2)
	}
	// Simulated time needs a test to run in, whose own output is not wanted.
	out := os.Stdout
	os.Stdout, _ = os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	testing.Main(func(string, string) (bool, error) { return true, nil }, []testing.InternalTest{{
		Name: "outages",
		F: func(t *testing.T) {
			results := measure(t, fault, *apart)
			if t.Failed() {
				return
			}
			write(out, *kind, *apart, results)
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
	outages int           // tried
	felt    int           // of which a call failed in
	failed  int           // calls, in the worst of them
	longest time.Duration // a call took
}

// measure tries all outages.
func measure(t *testing.T, fault imdsfake.Fault, apart time.Duration) map[key]result {
	results := map[key]result{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, c := range contestants {
		wg.Go(func() {
			for _, length := range lengths {
				var r result
				// Half a minute past, so that no outage begins or ends with a call.
				for start := every / 2; start < day; start += apart {
					synctest.Test(t, func(t *testing.T) {
						failed, longest := suffer(t, c, fault, start, length)
						r.outages++
						if failed > 0 {
							r.felt++
						}
						r.failed, r.longest = max(r.failed, failed), max(r.longest, longest)
					})
				}
				mu.Lock()
				results[key{c.name, length}] = r
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return results
}

// trials counts them. MSAL's cache is that of the process, and every bubble begins
// at the same time, so each trial is for a resource of its own.
var trials atomic.Int64

// suffer tries one outage, and returns how many calls failed in it and how long
// the longest one took.
func suffer(t *testing.T, c contestant, fault imdsfake.Fault, start, length time.Duration) (
	failed int, longest time.Duration,
) {
	fake := &imdsfake.Handler{}
	call, stop := c.start(t, fake, fmt.Sprintf("api://%d", trials.Add(1)))
	defer stop()
	fault.For = length
	begin := time.Now()
	time.AfterFunc(start, func() { fake.Inject(fault) })
	for n := time.Duration(0); n*every <= start+length+after; n++ {
		time.Sleep(time.Until(begin.Add(n * every)))
		called := time.Now()
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		err := call(ctx)
		cancel()
		if n == 0 {
			if err != nil {
				t.Fatalf("%s: the first call: %v", c.name, err)
			}
			continue
		}
		if err != nil {
			failed++
		}
		longest = max(longest, time.Since(called))
	}
	return failed, longest
}

// write writes the table.
func write(w io.Writer, kind string, apart time.Duration, results map[key]result) {
	fmt.Fprintf(w, "The metadata service fails (%s) for a while, beginning at any time of a "+
		"token's life (every %s). In how many of these outages calls fail; in the worst of them, "+
		"how many, of one a minute; and how long the longest call takes.\n\n", kind, short(apart))
	head, rule := "| outage |", "|---|"
	for _, c := range contestants {
		head += " " + c.name + " |"
		rule += "---|"
	}
	fmt.Fprintf(w, "%s\n%s\n", head, rule)
	for _, length := range lengths {
		row := fmt.Sprintf("| %s |", short(length))
		for _, c := range contestants {
			row += " " + results[key{c.name, length}].String() + " |"
		}
		fmt.Fprintln(w, row)
	}
	fmt.Fprintf(w, "\nMeasured on %s with %s, %s.\n",
		time.Now().Format(time.DateOnly), runtime.Version(), strings.Join(versions(), ", "))
}

func (r result) String() string {
	if r.failed == 0 && r.longest == 0 {
		return fmt.Sprintf("0 of %d", r.outages)
	}
	calls := "calls"
	if r.failed == 1 {
		calls = "call"
	}
	return fmt.Sprintf("%d of %d; %d %s; %s", r.felt, r.outages, r.failed, calls, short(r.longest))
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
