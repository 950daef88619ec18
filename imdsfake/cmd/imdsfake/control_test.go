package main

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/aztoso/mitoken/imdsfake"
)

func TestFaultsOverHTTP(t *testing.T) {
	p := start(t)
	if got := p.token(); got != 200 {
		t.Fatal(got)
	}
	for _, body := range []string{
		`{"status": 503, "for": "1h"}`,
		"status: 503\nfor: 1h\n",
		`[{"status": 503, "times": 1}, {"status": 503, "probability": 1}]`,
		"- status: 503\n  header: {X: y, for: z}\n- status: 410",
		"# a list\n---\n-\n  status: 503",
	} {
		if status, text := p.do("POST", "/imdsfake/faults", body); status != 204 {
			t.Fatalf("%s: %d %s", body, status, text)
		}
		if got := p.token(); got != 503 {
			t.Errorf("%s: a request got %d", body, got)
		}
		if status, _ := p.do("DELETE", "/imdsfake/faults", ""); status != 204 || p.token() != 200 {
			t.Errorf("%s: it cannot be ended", body)
		}
	}
	p.do("POST", "/imdsfake/faults", `{"latency": "1ms", "fields": {"a": null, "for": 1, "n": 12345678901234567890}, "times": 7}`)
	if _, text := p.do("GET", "/imdsfake/faults", ""); text != `[{"fields":{"a":null,"for":1,"n":12345678901234567890},"latency":"1ms","times":7}]` {
		t.Errorf("the script is %s", text)
	}
	for body, want := range map[string]string{
		`{"status": 99}`:               `faults[0]: status: 99 is not between`,
		`{"stats": 500}`:               `the body:1:2: unknown field`,
		`{"for": 1}`:                   `the body:1:9: for: \"1\" is no duration`,
		``:                             `the body is empty`,
		`# nothing`:                    `the body is empty`,
		`{}`:                           `faults[0]: it has no effect`,
		`[{"status": 500`:              `the body:`,
		`[{"status":500}, {"pad":-1}]`: `faults[1]: pad: -1`,
	} {
		if status, text := p.do("POST", "/imdsfake/faults", body); status != 400 || !strings.Contains(text, want) {
			t.Errorf("%s: got %d %s, want %s", body, status, text, want)
		}
	}
	big := "[" + strings.Repeat(`{"status": 503},`, 100_000) + "]"
	if status, text := p.do("POST", "/imdsfake/faults", big); status != 400 || !strings.Contains(text, "too large") {
		t.Errorf("a body that is too large: %d %.200s", status, text)
	}
	if _, text := p.do("GET", "/imdsfake/faults", ""); strings.Count(text, "{") != 2 {
		t.Errorf("a mistake changed something: %s", text)
	}
}

func TestJournalOverHTTP(t *testing.T) {
	p := start(t)
	if _, text := p.do("GET", "/imdsfake/requests", ""); text != "[]" {
		t.Errorf("at first: %s", text)
	}
	waited := make(chan string)
	go func() {
		_, text := p.do("GET", "/imdsfake/requests?atLeast=2&timeout=1m", "")
		waited <- text
	}()
	p.token()
	p.token()
	var requests []imdsfake.Request
	if text := <-waited; json.Unmarshal([]byte(text), &requests) != nil || len(requests) != 2 || requests[0].Host != imdsfake.IMDS {
		t.Errorf("got %s", text)
	}
	if status, text := p.do("GET", "/imdsfake/requests?atLeast=3&timeout=1ms", ""); status != 408 || !strings.Contains(text, "2 requests after 1ms, not 3") {
		t.Errorf("got %d %s", status, text)
	}
	for query, want := range map[string]string{"atLeast=x": "no number", "timeout=x": "no duration"} {
		if status, text := p.do("GET", "/imdsfake/requests?"+query, ""); status != 400 || !strings.Contains(text, want) {
			t.Errorf("%s: %d %s", query, status, text)
		}
	}
	var tokens []imdsfake.Token
	if _, text := p.do("GET", "/imdsfake/tokens", ""); json.Unmarshal([]byte(text), &tokens) != nil || len(tokens) != 1 || tokens[0].Claims["ver"] != "1.0" {
		t.Errorf("got %s", text)
	}
}

func TestTenantOverHTTP(t *testing.T) {
	p := start(t)
	assign := func(role string) (int, string) {
		return p.do("POST", "/imdsfake/assignments", `{"identity": "daemon", "resource": "https://myapp.aztoso.com", "role": "`+role+`"}`)
	}
	if status, text := assign("consumer"); status != 204 {
		t.Errorf("got %d %s", status, text)
	}
	if status, text := assign("admin"); status != 400 || !strings.Contains(text, `declares no app role \"admin\"`) {
		t.Errorf("got %d %s", status, text)
	}
	if status, text := p.do("POST", "/imdsfake/assignments", "nonsense: ["); status != 400 {
		t.Errorf("got %d %s", status, text)
	}
	var d imdsfake.Directory
	if _, text := p.do("GET", "/imdsfake/directory", ""); json.Unmarshal([]byte(text), &d) != nil || len(d.Assignments) != 2 || d.Assignments[1].Identity != "daemon" {
		t.Errorf("got %s", text)
	}
	keys := func() int {
		_, text := p.do("GET", "/common/discovery/keys", "")
		return strings.Count(text, `"kid"`)
	}
	if n := keys(); n != 1 {
		t.Errorf("%d keys", n)
	}
	if status, _ := p.do("POST", "/imdsfake/keys", ""); status != 204 || keys() != 2 {
		t.Errorf("%d, and %d keys", status, keys())
	}
	if status, text := p.do("GET", "/imdsfake/env?host=App+Service", ""); status != 200 || !strings.HasPrefix(text, "export IDENTITY_ENDPOINT='"+p.base+"/appservice/msi/token'\nexport IDENTITY_HEADER='") {
		t.Errorf("got %d %s", status, text)
	}
	if status, text := p.do("GET", "/imdsfake/env?host=mars", ""); status != 400 || !strings.Contains(text, "servicefabric") {
		t.Errorf("got %d %s", status, text)
	}
	if status, text := p.do("GET", "/imdsfake/env?host=entra", ""); status != 400 || !strings.Contains(text, "see -tls") {
		t.Errorf("got %d %s", status, text)
	}
	if status, _ := p.do("GET", "/imdsfake/nothing", ""); status != 404 {
		t.Errorf("got %d", status)
	}
}

// What is for a shell is quoted, whatever the secret; what is over https says so.
func TestEnvOverHTTP(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(file, []byte(`secret: it's $(id) "x"`), 0o600); err != nil {
		t.Fatal(err)
	}
	p := start(t, "-config", file, "-tls", "127.0.0.1:0")
	if _, text := p.do("GET", "/imdsfake/env?host=azureml", ""); !strings.HasSuffix(text, `export MSI_SECRET='it'\''s $(id) "x"'`+"\n") {
		t.Errorf("got %s", text)
	}
	if _, text := p.do("GET", "/imdsfake/env?host=servicefabric", ""); !strings.Contains(text, "IDENTITY_ENDPOINT='https://") {
		t.Errorf("got %s", text)
	}
	_, text := p.do("GET", "/imdsfake/certificate", "")
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(text)) || !strings.Contains(p.said, "/imdsfake/certificate") {
		t.Fatalf("got %s", text)
	}
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}
	base := regexp.MustCompile(`https://127\.0\.0\.1:\d+`).FindString(p.said)
	resp, err := (&http.Client{Transport: tr}).Get(base + "/common/discovery/keys")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
}

// A page of another origin that a browser shows on the same machine has no say.
func TestOtherOrigins(t *testing.T) {
	p := start(t)
	for _, path := range []string{"/imdsfake/faults", "/"} {
		if status, _ := p.do("POST", path, "status: 503", "Sec-Fetch-Site", "cross-site", "Content-Type", "text/plain"); status != 403 {
			t.Errorf("%s: got %d, want 403", path, status)
		}
	}
	if got := p.token(); got != 200 {
		t.Errorf("a request got %d", got)
	}
}
