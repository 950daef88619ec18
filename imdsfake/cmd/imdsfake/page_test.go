package main

import (
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"
)

// The page works without a script: its buttons are those of a form.
func TestPage(t *testing.T) {
	p := start(t)
	page := func() string {
		t.Helper()
		status, text := p.do("GET", "/", "")
		if status != 200 {
			t.Fatalf("got %d %s", status, text)
		}
		return text
	}
	press := func(fields url.Values) (int, string) {
		return p.do("POST", "/", fields.Encode(), "Content-Type", "application/x-www-form-urlencoded")
	}
	pressed := regexp.MustCompile(`value="(\w+)" title="[^"]*" aria-pressed="true"`)
	has := func(text string, wants ...string) {
		t.Helper()
		for _, want := range wants {
			if !strings.Contains(text, want) {
				t.Errorf("the page has no %q", want)
			}
		}
	}
	has(page(), "https://myapp.aztoso.com", "da000000-0000-4000-8000-000000000001", "consumer", "None yet.")
	if got := p.token(); got != 200 {
		t.Fatal(got)
	}
	has(page(), "a new token", "24 h 0 min left", "xms_mirid", `class="num good"`)
	for mood, want := range map[string]int{"503": 503, "429": 429, "upgrade": 410, "ok": 200} {
		if status, text := press(url.Values{"do": {mood}}); status != 200 { // after the redirect
			t.Errorf("%s: %d %s", mood, status, text)
		}
		if got := pressed.FindAllStringSubmatch(page(), -1); len(got) != 1 || got[0][1] != mood {
			t.Errorf("%s: pressed are %v", mood, got)
		}
		if got := p.token(); got != want {
			t.Errorf("%s: a request got %d, want %d", mood, got, want)
		}
	}
	has(page(), "a fault: 503", `class="num bad"`)
	for _, mood := range []string{"outage", "hang", "slow", "flaky"} {
		press(url.Values{"do": {mood}})
		if got := pressed.FindAllStringSubmatch(page(), -1); len(got) != 1 || got[0][1] != mood {
			t.Errorf("%s: pressed are %v", mood, got)
		}
	}
	press(url.Values{"do": {"ok"}})
	press(url.Values{"do": {"inject"}, "fault": {"status: 418\ntimes: 2"}})
	has(page(), "times: 2, status: 418")
	if got := p.token(); got != 418 {
		t.Errorf("a fault of one's own: %d", got)
	}
	for fault, want := range map[string]string{"stats: 1": "unknown field", "status: 1": "is not between"} {
		resp, err := http.PostForm(p.base, url.Values{"do": {"inject"}, "fault": {fault}})
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.Header.Get("Content-Security-Policy") == "" || resp.Header.Get("Content-Type") != "text/html; charset=utf-8" {
			t.Errorf("the header is %v", resp.Header)
		}
		if status, text := press(url.Values{"do": {"inject"}, "fault": {fault}}); status != 400 || !strings.Contains(text, want) {
			t.Errorf("%s: got %d %s", fault, status, text)
		}
	}
	if status, text := press(url.Values{"do": {"dance"}}); status != 400 || !strings.Contains(text, "no such button") {
		t.Errorf("got %d %s", status, text)
	}
	before, _ := p.do("GET", "/common/discovery/keys", "")
	press(url.Values{"do": {"rotate"}})
	if _, after := p.do("GET", "/common/discovery/keys", ""); before != 200 || strings.Count(after, `"kid"`) != 2 {
		t.Errorf("the keys are %s", after)
	}
	if status, _ := p.do("PUT", "/", ""); status != 405 {
		t.Errorf("got %d", status)
	}
}

// What clients send is shown as text, and no token is shown.
func TestPageIsSafe(t *testing.T) {
	p := start(t)
	_, answer := p.do("GET", "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https%3A%2F%2Fmyapp.aztoso.com", "", "Metadata", "true")
	token := regexp.MustCompile(`"access_token":"([^"]+)"`).FindStringSubmatch(answer)[1]
	p.do("GET", "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=%3Cscript%3Ealert(1)%3C/script%3E&client_id=%3Cb%3E", "", "Metadata", "true", "User-Agent", "<i>")
	_, text := p.do("GET", "/", "")
	if strings.Contains(text, "<script>alert") || strings.Contains(text, "<b>") || !strings.Contains(text, "&lt;script&gt;alert(1)") {
		t.Error("what a client sent is in the page as HTML")
	}
	for _, part := range strings.Split(token, ".") {
		if strings.Contains(text, part) {
			t.Error("a part of a token is in the page")
		}
	}
}
