package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/aztoso/mitoken"
	"github.com/aztoso/mitoken/imdsfake"
	"golang.org/x/oauth2"
)

// This file is who waits, and for how long.

// hanging is the longest of a million calls while a refresh gets no answer, beside
// the longest while there is none. What has it refreshed is a claims challenge.
func (t *table) hanging() {
	n := 1_000_000
	if t.quick {
		n = 1000
	}
	longest := func(src *mitoken.TokenSource) time.Duration {
		var most time.Duration
		for range n {
			begin := time.Now()
			must(src.Token())
			most = max(most, time.Since(begin))
		}
		return most
	}
	var ratios []float64
	for range rounds {
		cred, src, _ := newSource()
		idle := longest(src)
		cred.Close()

		fake := new(imdsfake.Handler)
		cred = &mitoken.Credential{IMDSTransport: fake}
		src = cred.TokenSource(resource)
		must(src.Token())
		fake.Inject(imdsfake.Fault{Failure: imdsfake.Hang})
		challenged := scope
		challenged.Claims = "{}"
		go cred.GetToken(context.Background(), challenged) // until Close
		must(fake.WaitFor(context.Background(), 2, nil))   // the refresh hangs now
		ratios = append(ratios, float64(longest(src))/float64(idle))
		cred.Close()
	}
	r := median(ratios)
	t.row("Token while a refresh hangs: the longest of a million calls", fmt.Sprintf("%.1fx that of an idle one", r), "at most 10x", r <= 10, "")
}

// stampede is 10,000 goroutines that want the first token, which takes 50 ms. To
// wake as many takes its time: those who wait on a bare channel tell how long.
func (t *table) stampede() {
	const callers, latency = 10_000, 50 * time.Millisecond
	run := func(start func(*http.Client) func(context.Context) error) (requests int, p99 time.Duration) {
		fake := new(imdsfake.Handler)
		get(fake, "https://stampede.example") // the time to sign a token is not ours
		fake.Inject(imdsfake.Fault{Latency: latency})
		get := start(&http.Client{Transport: fake})
		waits := make([]time.Duration, callers)
		var ready, done sync.WaitGroup
		gun := make(chan struct{})
		for i := range callers {
			ready.Add(1)
			done.Go(func() {
				ready.Done()
				<-gun
				begin := time.Now()
				if err := get(context.Background()); err != nil {
					panic(err)
				}
				waits[i] = time.Since(begin)
			})
		}
		ready.Wait()
		close(gun)
		done.Wait()
		slices.Sort(waits)
		return len(fake.Requests()) - 1, waits[callers*99/100]
	}
	most := 0
	var waits, floors []float64
	for range rounds {
		_, floor := run(func(*http.Client) func(context.Context) error {
			var once sync.Once
			done := make(chan struct{})
			return func(context.Context) error {
				once.Do(func() { time.AfterFunc(latency, func() { close(done) }) })
				<-done
				return nil
			}
		})
		floors = append(floors, float64(floor))
		requests, p99 := run(func(c *http.Client) func(context.Context) error {
			cred := &mitoken.Credential{IMDSTransport: c.Transport}
			src := cred.TokenSource("https://stampede.example")
			return func(ctx context.Context) error { _, err := src.TokenContext(ctx); return err }
		})
		most = max(most, requests)
		waits = append(waits, float64(p99))
	}
	theirs, _ := run(func(c *http.Client) func(context.Context) error {
		cred := must(azidentity.NewManagedIdentityCredential(&azidentity.ManagedIdentityCredentialOptions{
			ClientOptions: azcore.ClientOptions{Transport: c}}))
		return func(ctx context.Context) error {
			_, err := cred.GetToken(ctx, tokenOptions("https://stampede.example"))
			return err
		}
	})
	ratio, floor := median(waits)/float64(latency), median(floors)/float64(latency)
	t.row("10,000 goroutines, an empty cache, an answer after 50 ms",
		fmt.Sprintf("%d request, p99 %.2fx of its time; on a bare channel %.2fx", most, ratio, floor),
		"1, at most 1.2x, or 1.1x of a bare channel's", most == 1 && ratio <= max(1.2, 1.1*floor), fmt.Sprintf("azidentity: %d requests", theirs))
}

// failing is 200 callers who want the first token of an issuer that refuses after
// 50 ms.
func (t *table) failing() {
	callers := 200
	if t.quick {
		callers = 5
	}
	run := func(start func(*imdsfake.Handler) (get func() error, end func())) (requests int, last time.Duration) {
		fake := &imdsfake.Handler{Cache: imdsfake.NoCache}
		fake.Inject(imdsfake.Fault{Status: http.StatusBadRequest, Latency: 50 * time.Millisecond})
		get, end := start(fake)
		defer end()
		begin := time.Now()
		var wg sync.WaitGroup
		for range callers {
			wg.Go(func() {
				if get() == nil {
					panic("there is a token")
				}
			})
		}
		wg.Wait()
		return len(fake.Requests()), time.Since(begin)
	}
	requests, last := run(func(fake *imdsfake.Handler) (func() error, func()) {
		cred := &mitoken.Credential{IMDSTransport: fake}
		src := cred.TokenSource("r")
		return func() error { _, err := src.Token(); return err }, func() { cred.Close() }
	})
	theirs, theirLast := run(func(fake *imdsfake.Handler) (func() error, func()) {
		// x/oauth2 keeps tokens, not errors; what it asks is one exchange.
		src := oauth2.ReuseTokenSource(nil, exchange{fake})
		return func() error { _, err := src.Token(); return err }, func() {}
	})
	t.row("200 callers, an empty cache, a refusal after 50 ms", fmt.Sprintf("%d request, the last caller released after %v", requests, last.Round(time.Millisecond)),
		"those of one flight, all together", requests == 1 && last < 100*time.Millisecond,
		fmt.Sprintf("x/oauth2: %d requests, the last one after %v", theirs, theirLast.Round(10*time.Millisecond)))
}

// exchange is a source that asks IMDS once each time.
type exchange struct{ imds http.RoundTripper }

func (e exchange) Token() (*oauth2.Token, error) {
	req := must(http.NewRequest(http.MethodGet, "http://169.254.169.254/metadata/identity/oauth2/token?api-version=2018-02-01&resource=r", nil))
	req.Header.Set("Metadata", "true")
	resp, err := e.imds.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	resp.Body.Close()
	return nil, fmt.Errorf("refused: %s", resp.Status)
}

// rest is what a source costs that nobody uses.
func (t *table) rest() {
	const n = 1000
	fake := &imdsfake.Handler{Cache: imdsfake.UntilExpiry}
	token := len(must((&mitoken.Credential{IMDSTransport: fake}).TokenSource("warm").Token()).AccessToken)
	creds := make([]*mitoken.Credential, n)
	for i := range n { // the fake's own share comes first
		get(fake, fmt.Sprint("r", i))
	}
	before, goroutines := heap(), runtime.NumGoroutine()
	for i := range n {
		creds[i] = &mitoken.Credential{IMDSTransport: fake}
		must(creds[i].TokenSource(fmt.Sprint("r", i)).Token())
	}
	each := (heap()-before)/n - 2*token // in the token, and in the header
	more := runtime.NumGoroutine() - goroutines
	runtime.KeepAlive(creds)
	for _, c := range creds {
		c.Close()
	}
	t.row("a source at rest, with its Credential", fmt.Sprintf("%.1f KiB beside the token and its header, %d goroutines", float64(each)/1024, more),
		"at most 8 KiB, 0", each <= 8<<10 && more == 0, "")
}

func get(fake *imdsfake.Handler, resource string) {
	cred := &mitoken.Credential{IMDSTransport: fake}
	must(cred.TokenSource(resource).Token())
	cred.Close()
}

func heap() int {
	var m runtime.MemStats
	for range 3 {
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// firstToken is a process, from its start to its first token, over loopback. Each
// finds the fake as it can: azidentity has no other endpoint than that of a host
// which its environment names.
func (t *table) firstToken() {
	srv := imdsfake.NewServer(&imdsfake.Handler{Cache: imdsfake.UntilExpiry})
	defer srv.Close()
	times := map[string][]float64{}
	requests := map[string]int{}
	n := 60
	if t.quick {
		n = 2
	}
	for range n {
		for _, who := range []string{"mitoken", "azidentity"} {
			before := len(srv.Handler.Requests())
			cmd := exec.Command(must(os.Executable()), "first", who, srv.URL)
			for name, value := range srv.Env(imdsfake.AppService) {
				cmd.Env = append(cmd.Env, name+"="+value)
			}
			begin := time.Now()
			if out, err := cmd.CombinedOutput(); err != nil {
				panic(fmt.Sprintf("%s: %v %s", who, err, out))
			}
			times[who] = append(times[who], float64(time.Since(begin)))
			requests[who] = len(srv.Handler.Requests()) - before
		}
	}
	ours, theirs := median(times["mitoken"]), median(times["azidentity"])
	t.row("the first token, from the start of the process", fmt.Sprintf("%.2fx of azidentity's time, %d request", ours/theirs, requests["mitoken"]),
		"below azidentity's, 1", ours < theirs && requests["mitoken"] == 1,
		fmt.Sprintf("azidentity %.1f ms, %d request", theirs/1e6, requests["azidentity"]))
}

// first is a process that gets one token.
func first(args []string) bool {
	if len(args) != 3 || args[0] != "first" {
		return false
	}
	switch args[1] {
	case "mitoken":
		cred := &mitoken.Credential{Endpoint: args[2]}
		must(cred.TokenSource(resource).Token())
	case "azidentity":
		must(must(azidentity.NewManagedIdentityCredential(nil)).GetToken(context.Background(), scope))
	}
	return true
}
