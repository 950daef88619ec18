package main

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/aztoso/mitoken/imdsfake"
	"github.com/goccy/go-yaml"
)

//go:embed page.html
var pageHTML string

var pageTemplate = template.Must(template.New("page").Funcs(template.FuncMap{
	"clock": func(t time.Time) string { return t.Local().Format("15:04:05.000") },
	"class": class,
	"claim": func(v any) string { return claim(v) },
	"short": short,
	"path":  func(s string) string { return strings.TrimPrefix(s, "/metadata/identity") },
}).Parse(pageHTML))

// requestsShown and tokensShown are how many of the last ones the page has.
const (
	requestsShown = 50
	tokensShown   = 20
)

// A mood is a switch on the page: what IMDS is to be like from then on.
type mood struct {
	ID, Label, Title string
	faults           []imdsfake.Fault
	On               bool
}

// moods are the switches. The first one is that all is well.
func moods() []mood {
	return []mood{
		{ID: "ok", Label: "Working", Title: "Requests are answered as ever"},
		{ID: "outage", Label: "Outage", Title: "Connections are reset", faults: []imdsfake.Fault{{Failure: imdsfake.Refuse}}},
		{ID: "503", Label: "503", Title: "Service unavailable", faults: []imdsfake.Fault{{Status: 503}}},
		{ID: "429", Label: "429", Title: "Too many requests", faults: []imdsfake.Fault{{Status: 429}}},
		{ID: "upgrade", Label: "Upgrade", Title: "410 for 70 seconds", faults: []imdsfake.Fault{{Status: 410, For: 70 * time.Second}}},
		{ID: "hang", Label: "Hang", Title: "No answer, ever", faults: []imdsfake.Fault{{Failure: imdsfake.Hang}}},
		{ID: "slow", Label: "Slow", Title: "2 to 5 seconds late", faults: []imdsfake.Fault{{Latency: 2 * time.Second, Jitter: 3 * time.Second}}},
		{ID: "flaky", Label: "Flaky", Title: "Every other request fails", faults: []imdsfake.Fault{{Status: 500, Probability: 0.5}}},
	}
}

// pageData is what the page shows.
type pageData struct {
	imdsfake.Directory
	Now      time.Time
	Moods    []mood
	Faults   []string // in words
	Requests []imdsfake.Request
	Tokens   []shownToken
	Total    int // requests
	Error    string
}

// shownToken is a token with what a person wants to know of it.
type shownToken struct {
	imdsfake.Token
	Name   string // of the identity
	Left   time.Duration
	Part   int // of its life that is left, in percent
	Claims []shownClaim
}

type shownClaim struct {
	Name  string
	Value any
}

// page is what a person wants to see while debugging.
type page struct{ fake *imdsfake.Handler }

func newPage(fake *imdsfake.Handler) http.Handler {
	return http.NewCrossOriginProtection().Handler(page{fake})
}

func (p page) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var wrong error
	status := http.StatusOK
	switch r.Method {
	case http.MethodGet, http.MethodHead:
	case http.MethodPost:
		if wrong = p.do(r); wrong == nil {
			http.Redirect(w, r, "/", http.StatusSeeOther)
			return
		}
		status = http.StatusBadRequest
	default:
		w.Header().Set("Allow", "GET, HEAD, POST")
		http.Error(w, "Only GET and POST", http.StatusMethodNotAllowed)
		return
	}
	data := p.data(time.Now())
	if wrong != nil {
		data.Error = wrong.Error()
	}
	var b bytes.Buffer
	if err := pageTemplate.Execute(&b, data); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "+
		"connect-src 'self'; form-action 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'")
	w.WriteHeader(status)
	_, _ = w.Write(b.Bytes()) // a client that has left wants nothing
}

// do does what a button says.
func (p page) do(r *http.Request) error {
	if err := r.ParseForm(); err != nil {
		return err
	}
	switch what := r.PostForm.Get("do"); what {
	case "rotate":
		p.fake.RotateKey()
	case "inject":
		f := imdsfake.Fault{}
		if err := decode([]byte(r.PostForm.Get("fault")), &f); err != nil {
			return fmt.Errorf("the fault:%w", err)
		}
		if err := f.Check(); err != nil {
			return fmt.Errorf("the fault: %w", err)
		}
		p.fake.Inject(f)
	default:
		i := slices.IndexFunc(moods(), func(m mood) bool { return m.ID == what })
		if i < 0 {
			return errors.New("there is no such button")
		}
		p.fake.Clear()
		p.fake.Inject(moods()[i].faults...)
	}
	return nil
}

func (p page) data(now time.Time) pageData {
	requests := p.fake.Requests()
	d := pageData{Directory: p.fake.Directory(), Now: now, Moods: moods(), Total: len(requests)}
	d.Requests = requests[max(0, len(requests)-requestsShown):]
	slices.Reverse(d.Requests)
	script := p.fake.Faults()
	for _, f := range script {
		d.Faults = append(d.Faults, words(f))
	}
	for i := range d.Moods {
		d.Moods[i].On = d.Moods[i].isOn(script)
	}
	names := map[string]string{}
	for _, id := range d.Identities {
		names[id.ClientID] = id.Name
	}
	for _, sp := range d.ServicePrincipals {
		names[sp.ClientID] = sp.Name
	}
	tokens := p.fake.Tokens()
	tokens = tokens[max(0, len(tokens)-tokensShown):]
	for _, t := range slices.Backward(tokens) {
		d.Tokens = append(d.Tokens, show(t, names[t.ClientID], now))
	}
	return d
}

// isOn tells whether a script is that of the switch.
func (m mood) isOn(script []imdsfake.Fault) bool {
	if len(script) != len(m.faults) {
		return false
	}
	if len(script) == 0 {
		return true
	}
	got, want := script[0], m.faults[0]
	got.For, want.For = 0, 0 // which runs down
	return words(got) == words(want)
}

func show(t imdsfake.Token, name string, now time.Time) shownToken {
	s := shownToken{Token: t, Name: name, Left: max(0, t.Expiry.Sub(now))}
	s.Part = int(100 * s.Left.Seconds() / t.Expiry.Sub(t.Issued).Seconds())
	for name, value := range t.Claims {
		s.Claims = append(s.Claims, shownClaim{name, value})
	}
	slices.SortFunc(s.Claims, func(a, b shownClaim) int { return strings.Compare(a.Name, b.Name) })
	return s
}

// words is a fault as the file would have it, on one line.
func words(f imdsfake.Fault) string {
	text, err := yaml.MarshalWithOptions(f, yaml.Flow(true))
	if err != nil {
		return err.Error()
	}
	line := strings.TrimSpace(string(text))
	return strings.TrimSuffix(strings.TrimPrefix(line, "{"), "}")
}

// claim is the value of a claim, with times in words.
func claim(v any) string {
	switch v := v.(type) {
	case int64:
		return strconv.FormatInt(v, 10) + " (" + time.Unix(v, 0).UTC().Format(time.RFC3339) + ")"
	case string:
		return v
	}
	text, _ := json.Marshal(v) // claims always encode
	return string(text)
}

// short is a duration in words that do not change each second, unless it is
// short.
func short(d time.Duration) string {
	if d < 2*time.Minute {
		return d.Round(time.Second).String()
	}
	d = d.Round(time.Minute)
	return fmt.Sprintf("%d h %d min", d/time.Hour, d%time.Hour/time.Minute)
}

// class is the kind of an outcome.
func class(r imdsfake.Request) string {
	if r.Status >= 200 && r.Status < 300 && r.Error == "" {
		return "good"
	}
	return "bad"
}
