package mitoken

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
)

// A scenario is a row of testdata/scenarios.json: what a caller gets where the
// cache is in a state and IMDS gives an answer, and when IMDS is asked again if
// nobody calls. The caller waits for a second at most. Each row is run with three
// sequels: time passes, a service refuses the token, and Close.
//
// States: empty; fresh, an hour after the first token ("held"); due, when the
// refresh falls due; expired, when the machine resumes after 25 h.
//
// Answers: a new token; the same as before; another one, with 4 h left (older); one that
// has expired; a retryable error (503); a final one (400); none (hang).
type scenario struct {
	State  string
	Answer string

	Gets  string     // "held", "new", or what is in the error
	Waits duration   // before that
	Asked int        // requests to IMDS for it; 0 with a wait: as many as the round makes
	Again []duration // when the next request is, from and to; none if never

	Challenge      string   // what a caller gets who brings a claims challenge 10 minutes later
	ChallengeWaits duration // before that
}

// A duration is one that is written as in Go.
type duration struct{ time.Duration }

func (d *duration) UnmarshalText(text []byte) (err error) {
	d.Duration, err = time.ParseDuration(string(text))
	return err
}

func TestScenarios(t *testing.T) {
	file, err := os.Open("testdata/scenarios.json")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	d := json.NewDecoder(file)
	d.DisallowUnknownFields()
	var scenarios []scenario
	if err := d.Decode(&scenarios); err != nil {
		t.Fatal(err)
	}
	sequels := map[string]func(*stage, *testing.T){
		"time passes": (*stage).timePasses, "challenge": (*stage).challenged, "close": (*stage).closed,
	}
	ran := map[string]bool{}
	for _, s := range scenarios {
		for name, sequel := range sequels {
			name = s.State + "/" + s.Answer + "/" + name
			ran[name] = true
			t.Run(name, func(t *testing.T) {
				for range 16 / Stride { // delays are drawn
					synctest.Test(t, func(t *testing.T) { play(t, s, sequel) })
				}
			})
		}
	}
	// States x answers x sequels: a row that is lost is noticed.
	if want := 4 * 7 * 3; len(ran) != want {
		t.Errorf("%d scenarios, want %d", len(ran), want)
	}
}

// A stage is where a scenario is played: a Credential, IMDS, and a clock that can
// be suspended.
type stage struct {
	scenario
	clock skewedClock
	cred  Credential

	mu       sync.Mutex
	answer   string
	requests []time.Time
	tokens   []string // values, as they were first issued
	body     string   // of the last answer with a token
}

// play brings the cache into its state, makes the call, and goes on to the
// sequel.
func play(t *testing.T, s scenario, sequel func(*stage, *testing.T)) {
	st := &stage{scenario: s, answer: "new"}
	st.cred = Credential{IMDSTransport: st, clock: &st.clock}
	defer st.cred.Close()
	switch s.State {
	case "empty":
		st.tokens = []string{"none"} // so that the first one is a new one
	default:
		st.call(t, "", "held", 0)
	}
	switch s.State {
	case "fresh":
		time.Sleep(time.Hour)
	case "due":
		refreshOn := st.cred.TokenSource("r").Status().RefreshOn
		time.Sleep(time.Until(refreshOn) - time.Nanosecond)
	case "expired":
		st.clock.step(25 * time.Hour)
	}
	before := len(st.requests)
	st.set(s.Answer)
	if s.State == "due" {
		time.Sleep(time.Nanosecond)
		synctest.Wait()
	}
	st.call(t, "", s.Gets, s.Waits.Duration)
	asked := len(st.times()) - before
	if asked != s.Asked && !(s.Asked == 0 && s.Waits.Duration > 0) {
		t.Errorf("%d requests, want %d", asked, s.Asked)
	}
	sequel(st, t)
}

func (st *stage) set(answer string) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.answer = answer
}

func (st *stage) times() []time.Time {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.requests
}

// timePasses waits for the next request.
func (st *stage) timePasses(t *testing.T) {
	returned, before := time.Now(), len(st.times())
	time.Sleep(13 * time.Hour)
	later := st.times()[before:]
	switch {
	case len(st.Again) == 0 && len(later) > 0:
		t.Errorf("it was asked again after %v", later[0].Sub(returned))
	case len(st.Again) == 0:
	case len(later) == 0:
		t.Error("it was not asked again")
	default:
		if got := later[0].Sub(returned); got < st.Again[0].Duration || got > st.Again[1].Duration {
			t.Errorf("it was asked again after %v, want %v to %v", got, st.Again[0], st.Again[1])
		}
	}
}

// challenged makes a call with claims.
func (st *stage) challenged(t *testing.T) {
	time.Sleep(10 * time.Minute)
	st.call(t, `{"access_token":{}}`, st.Challenge, st.ChallengeWaits.Duration)
}

func (st *stage) closed(t *testing.T) {
	st.cred.Close()
	before := len(st.times())
	st.call(t, "", ErrClosed.Error(), 0)
	time.Sleep(2 * day)
	if after := len(st.times()); after > before {
		t.Errorf("%d requests after Close", after-before)
	}
}

// call asks for a token, and checks what comes after how long.
func (st *stage) call(t *testing.T, claims, want string, waits time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	begin := time.Now()
	tok, err := st.cred.GetToken(ctx, policy.TokenRequestOptions{Scopes: []string{"r"}, Claims: claims})
	if took := time.Since(begin); took != waits {
		t.Errorf("waited %v, want %v", took, waits)
	}
	if err != nil {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
		return
	}
	names := []string{"held", "new", "newer"}
	if got := names[min(slices.Index(st.tokens, tok.Token), 2)]; got != want {
		t.Errorf("got the %s token, want %q", got, want)
	}
	if !st.clock.now().time().Before(tok.ExpiresOn) {
		t.Errorf("got a token that expired at %v", tok.ExpiresOn)
	}
}

// RoundTrip is IMDS.
func (st *stage) RoundTrip(req *http.Request) (*http.Response, error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.requests = append(st.requests, time.Now())
	now := st.clock.now().time()
	switch st.answer {
	case "new":
		st.issue(now, now.Add(day))
	case "same":
		if st.body == "" {
			st.issue(now, now.Add(day))
		}
	case "older":
		st.issue(now.Add(-20*time.Hour), now.Add(4*time.Hour))
	case "expired":
		st.issue(now.Add(-day), now.Add(-time.Second))
	case "retryable":
		return respond(req, http.StatusServiceUnavailable, ""), nil
	case "final":
		return respond(req, http.StatusBadRequest, ""), nil
	case "hang":
		st.mu.Unlock()
		<-req.Context().Done()
		st.mu.Lock()
		return nil, req.Context().Err()
	default:
		panic(st.answer)
	}
	return respond(req, http.StatusOK, st.body), nil
}

// issue makes the next token.
func (st *stage) issue(issued, expiry time.Time) {
	value := fmt.Sprint("token", len(st.tokens))
	st.tokens = append(st.tokens, value)
	st.body = fmt.Sprintf(`{"access_token":%q,"expires_on":%d,"not_before":%d}`,
		value, expiry.Unix(), issued.Unix())
}
