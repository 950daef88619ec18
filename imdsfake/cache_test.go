package imdsfake_test

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aztoso/mitoken/imdsfake"
)

// TestCaches asks once an hour, for a day and a half, and numbers the tokens that
// come. Between hours there is a nanosecond, for the edges.
func TestCaches(t *testing.T) {
	for cache, want := range map[imdsfake.Cache]string{
		"":                        "1 at 0s, 2 at 24h0m0s",
		imdsfake.UntilExpiry:      "1 at 0s, 2 at 24h0m0s",
		imdsfake.UntilHalfLife:    "1 at 0s, 2 at 12h0m0s, 3 at 24h0m0s, 4 at 36h0m0s",
		imdsfake.UntilLastMinutes: "1 at 0s, 2 at 24h0m0s", // asked once an hour, that is the same
		imdsfake.AgedFirst:        "1 at 0s, 2 at 1h0m0s, 3 at 25h0m0s",
	} {
		t.Run(string(cache), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := &imdsfake.Handler{Cache: cache}
				begin := time.Now()
				var got []string
				last := ""
				for range 37 {
					if _, a := get(t, fake, plain); a["access_token"] != last {
						last = a["access_token"]
						got = append(got, fmt.Sprintf("%d at %v", len(got)+1, time.Since(begin)))
					}
					time.Sleep(time.Hour)
				}
				if strings.Join(got, ", ") != want {
					t.Errorf("got %s, want %s", strings.Join(got, ", "), want)
				}
			})
		})
	}
}

// numbered asks several times, and numbers the tokens that come.
func numbered(t *testing.T, fake *imdsfake.Handler, n int) string {
	var tokens, got []string
	for range n {
		_, a := get(t, fake, plain)
		i := slices.Index(tokens, a["access_token"])
		if i < 0 {
			i = len(tokens)
			tokens = append(tokens, a["access_token"])
		}
		got = append(got, fmt.Sprint(i+1))
	}
	return strings.Join(got, " ")
}

func TestCachesInTurn(t *testing.T) {
	for cache, want := range map[imdsfake.Cache]string{
		imdsfake.NoCache:         "1 2 3 4 5 6",
		imdsfake.UntilExpiry:     "1 1 1 1 1 1",
		imdsfake.Alternating:     "1 2 1 2 1 2",
		imdsfake.OlderAfterNewer: "1 2 1 3 2 4",
	} {
		if got := numbered(t, &imdsfake.Handler{Cache: cache}, 6); got != want {
			t.Errorf("%s: got tokens %s, want %s", cache, got, want)
		}
	}
}

// Each edge to the nanosecond: expires_in counts from the issue throughout, as
// Microsoft's document has it, and no expired token is given out.
func TestCacheEdges(t *testing.T) {
	for cache, edge := range map[imdsfake.Cache]time.Duration{
		imdsfake.UntilExpiry:      24 * time.Hour,
		imdsfake.UntilHalfLife:    12 * time.Hour,
		imdsfake.UntilLastMinutes: 24*time.Hour - 5*time.Minute,
		imdsfake.AgedFirst:        time.Hour - 5*time.Minute,
	} {
		t.Run(string(cache), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := &imdsfake.Handler{Cache: cache}
				_, first := get(t, fake, plain)
				time.Sleep(edge - 1)
				_, same := get(t, fake, plain)
				if same["access_token"] != first["access_token"] || same["expires_in"] != "86400" {
					t.Error("1 ns before the edge: another token")
				}
				if _, other := get(t, fake, "api-version=2018-02-01&resource=other"); other["access_token"] == first["access_token"] {
					t.Error("another resource got the same token")
				}
				time.Sleep(time.Nanosecond)
				if _, next := get(t, fake, plain); next["access_token"] == first["access_token"] {
					t.Error("at the edge: the same token")
				}
			})
		})
	}
}

func TestManyAtOnceGetOneToken(t *testing.T) {
	fake := new(imdsfake.Handler)
	var mu sync.Mutex
	tokens := map[string]bool{}
	var wg sync.WaitGroup
	for range 200 {
		wg.Go(func() {
			_, a := get(t, fake, plain)
			mu.Lock()
			defer mu.Unlock()
			tokens[a["access_token"]] = true
		})
	}
	wg.Wait()
	if len(tokens) != 1 || len(fake.Requests()) != 200 || len(fake.Tokens()) != 1 {
		t.Errorf("%d tokens for %d requests, want 1 for 200", len(tokens), len(fake.Requests()))
	}
}

// A role that is assigned is in the tokens that are issued from then on, not in
// that of the cache: the surprise that everybody has once.
func TestRolesAndCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := newTenant(t)
		roles := func() string {
			_, a := get(t, fake, plain)
			return fmt.Sprint(verify(t, fake, fake.Issuer(), a["access_token"], resource)["roles"])
		}
		if got := roles(); got != "<nil>" {
			t.Errorf("before: %s", got)
		}
		a := imdsfake.Assignment{Identity: "host", Resource: resource, Role: "consumer"}
		fake.Assign(a, a)
		if got := roles(); got != "<nil>" {
			t.Errorf("the token of the cache has %s", got)
		}
		time.Sleep(24 * time.Hour)
		if got := roles(); got != "[consumer]" {
			t.Errorf("after: %s", got)
		}
	})
}

// TestLimits has a machine that asks too often, and too much at once.
func TestLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := &imdsfake.Handler{Limits: imdsfake.Limits{PerSecond: 20, AtOnce: 5}}
		statuses := func(n int, each func() int) map[int]int {
			var mu sync.Mutex
			got := map[int]int{}
			var wg sync.WaitGroup
			for range n {
				wg.Go(func() {
					s := each()
					mu.Lock()
					defer mu.Unlock()
					got[s]++
				})
			}
			wg.Wait()
			return got
		}
		token := func() int {
			resp, _ := get(t, fake, plain)
			return resp.StatusCode
		}
		fake.Inject(imdsfake.Fault{Latency: 100 * time.Millisecond, Times: 6})
		if got := statuses(6, token); got[200] != 5 || got[429] != 1 {
			t.Errorf("6 at once got %v, want 5 of them served", got)
		}
		served := 0
		for range 30 {
			if token() == 200 {
				served++
			}
			time.Sleep(10 * time.Millisecond)
		}
		if served != 15 { // with the five above, 20 in a second
			t.Errorf("%d of 30 in the same second were served, want 15", served)
		}
		time.Sleep(time.Second)
		if got := token(); got != 200 {
			t.Errorf("a second later: %d", got)
		}
		// It is the limit of IMDS, and of all of it.
		resp, err := fake.RoundTrip(newRequestTo(http.MethodGet, "http://x/metadata/instance?api-version=2021-02-01"))
		if err != nil || resp.StatusCode != 200 {
			t.Errorf("the document: %v %v", resp, err)
		}
		for range 30 {
			if resp, a := getFrom(t, fake, imdsfake.AppService, "api-version=2019-08-01&resource=x"); resp.StatusCode != 200 {
				t.Fatalf("App Service: %s %v", resp.Status, a)
			}
		}
		last := fake.Requests()[6]
		if last.Status == 429 && (last.Error != "too_many_requests" || !strings.Contains(last.Reason, "Throttle")) {
			t.Errorf("the journal has %+v", last)
		}
	})
}
