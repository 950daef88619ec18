package mitoken

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

// sample is the answer in Microsoft's document, with a client ID.
const sample = `{
	"access_token": "eyJ0eXAi.e30.c2ln",
	"client_id": "5E29463D-71DA-4FE0-8E69-999B57DB23B0",
	"refresh_token": "",
	"expires_in": "3599",
	"expires_on": "1506484173",
	"not_before": "1506480273",
	"resource": "https://management.azure.com/",
	"token_type": "Bearer"
}`

func TestParseToken(t *testing.T) {
	const clientID = "5e29463d-71da-4fe0-8e69-999b57db23b0"
	got, err := parseToken([]byte(sample), "https://management.azure.com", clientID)
	if err != nil {
		t.Fatal(err)
	}
	want := token{"eyJ0eXAi.e30.c2ln", time.Unix(1506484173, 0), time.Unix(1506480273, 0), 3599 * time.Second}
	if *got != want {
		t.Errorf("got %v, want %v", *got, want)
	}
	// Each row is the sample with one thing replaced.
	for _, tc := range []struct {
		name     string
		old, new string
		want     string // of the error; empty if there is none
	}{
		{"numbers", `"1506484173"`, `1506484173`, ""},
		{"no token_type", `,
	"token_type": "Bearer"`, ``, ""},
		{"empty token_type", `"Bearer"`, `""`, ""},
		{"bearer in lower case", `"Bearer"`, `"bearer"`, ""},
		{"no client_id", `"client_id": "5E29463D-71DA-4FE0-8E69-999B57DB23B0",`, ``, ""},
		{"no not_before", `"not_before": "1506480273",`, ``, ""},
		{"empty not_before", `"1506480273"`, `""`, ""},
		{"no resource", `"resource": "https://management.azure.com/",`, ``, ""},
		{"an unknown field", `"refresh_token": ""`, `"x": {"access_token": [1, {}]}`, ""},
		{"a null", `"refresh_token": ""`, `"refresh_token": null`, ""},

		{"no access_token", `"access_token": "eyJ0eXAi.e30.c2ln",`, ``, "access_token is empty"},
		{"null access_token", `"eyJ0eXAi.e30.c2ln"`, `null`, "access_token is empty"},
		{"access_token is a number", `"eyJ0eXAi.e30.c2ln"`, `7`, "access_token is not a string"},
		{"space", `eyJ0eXAi.e30`, `eyJ0 SECRET`, "RFC 6750"},
		{"line break", `eyJ0eXAi.e30`, `eyJ0\r\nSECRET`, "RFC 6750"},
		{"tab at the end", `e30.c2ln`, `e30.c2ln\t`, "RFC 6750"},
		{"line feed at the end", `e30.c2ln`, `e30.c2ln\n`, "RFC 6750"},
		{"not ASCII", `e30.c2ln`, `e30.SÉCRET`, "RFC 6750"},
		{"= in the middle", `e30.c2ln`, `e30=.c2ln`, "RFC 6750"},
		{"case variant", `"refresh_token": ""`, `"ACCESS_TOKEN": "SECRET"`, "access_token twice"},
		{"other fold", `"refresh_token": ""`, `"acceſſ_token": "SECRET"`, "access_token twice"},
		{"duplicate", `"refresh_token": ""`, `"expires_on": "9506484173"`, "expires_on twice"},
		{"unknown duplicate", `"refresh_token": ""`, `"SECRET": 1, "SECRET": 2`, "a field twice"},
		{"no expires_on", `"expires_on": "1506484173",`, ``, "expires_on is missing"},
		{"empty expires_on", `"1506484173"`, `""`, "expires_on is missing"},
		{"expires_on 0", `"1506484173"`, `0`, "expires_on is missing"},
		{"negative expires_on", `"1506484173"`, `-5`, "expires_on is out of range"},
		{"fraction", `"1506484173"`, `1506484173.5`, "expires_on is not a whole number"},
		{"exponent", `"1506484173"`, `15e8`, "expires_on is not a whole number"},
		{"a date", `"1506484173"`, `"2017-09-27T03:49:33Z"`, "expires_on is not a whole number"},
		{"overflow", `"1506484173"`, `99999999999999999999`, "expires_on is not a whole number"},
		{"milliseconds", `"1506484173"`, `1506484173000`, "expires_on is out of range"},
		{"a list", `"1506484173"`, `[1506484173]`, "expires_on is not a number"},
		{"bad not_before", `"1506480273"`, `"soon"`, "not_before is not a whole number"},
		{"bad expires_in", `"3599"`, `true`, "expires_in is not a number"},
		{"other token_type", `"Bearer"`, `"pop"`, "token_type is not Bearer"},
		{"token_type with a header", `"Bearer"`, `"Bearer\r\nX: 1"`, "token_type is not Bearer"},
		{"other resource", `"https://management.azure.com/"`, `"https://vault.azure.net"`, `resource is "https://vault.azure.net"`},
		{"two slashes more", `azure.com/"`, `azure.com//"`, "resource is"},
		{"other case", `https://management`, `https://MANAGEMENT`, "resource is"},
		{"other client_id", `5E29`, `0000`, "client_id is"},
		{"a list of it", `{`, `[{`, "not a JSON object"},
		{"trailing data", `"token_type": "Bearer"
}`, `"token_type": "Bearer"
} {}`, "goes on after"},
		{"truncated", `"token_type": "Bearer"
}`, `"token_type": "Bea`, "not valid JSON"},
		{"byte order mark", `{`, "\ufeff{", "not a JSON object"},
		{"HTML", sample, `<html>SECRET`, "not a JSON object"},
		{"a string", sample, `"SECRET"`, "not a JSON object"},
		{"nothing", sample, ``, "not a JSON object"},
		{"key only", sample, `{"SECRET"`, "not valid JSON"},
		{"no key", sample, `{1: "SECRET"}`, "not valid JSON"},
		{"comma at the end", sample, `{"a": 1,}`, "not valid JSON"},
		{"longer than 64 KiB", `"refresh_token": ""`, `"refresh_token": "` + strings.Repeat("x", maxAnswer) + `"`, "longer than 65536 bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			body := strings.Replace(sample, tc.old, tc.new, 1)
			if body == sample {
				t.Fatal("the row changes nothing")
			}
			tok, err := parseToken([]byte(body), "https://management.azure.com", clientID)
			switch {
			case tc.want == "" && err != nil:
				t.Error(err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("got %v, %v, want %q", tok, err, tc.want)
			case err != nil && strings.Contains(err.Error(), "SECRET"):
				t.Errorf("the error shows the token: %v", err)
			}
		})
	}
}

// Whoever asks by object ID cannot know the client ID.
func TestClientIDIsComparedOnlyIfAskedFor(t *testing.T) {
	if _, err := parseToken([]byte(sample), "https://management.azure.com", ""); err != nil {
		t.Error(err)
	}
}

func TestAnswerOfAProxy(t *testing.T) {
	cred := &Credential{IMDSTransport: roundTripper(func(req *http.Request) (*http.Response, error) {
		resp := respond(req, 200, "<html>")
		resp.Header.Set("Content-Type", "text/html; charset=utf-8")
		return resp, nil
	})}
	defer cred.Close()
	_, err := cred.TokenSource("r").Token()
	want := `mitoken: token for "r": the metadata service answered 200, but the answer is not a JSON object; ` +
		`its content type is "text/html": is a proxy in between?`
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %v", err, want)
	}
}

// FuzzParseToken checks that whatever bytes come, there is an error, or a token
// that may stand in a header.
func FuzzParseToken(f *testing.F) {
	f.Add([]byte(sample))
	f.Add([]byte(`{"access_token":"a","expires_on":1}`))
	f.Add([]byte(`{"access_token":"a","expires_on":1,"Access_Token":"b"}`))
	f.Add([]byte(`{"error":{"code":1}}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		tok, err := parseToken(body, "https://management.azure.com", "")
		if err != nil {
			return
		}
		if tok.expiry.Unix() <= 0 || tok.expiresIn < 0 || checkToken(tok.value) != nil {
			t.Errorf("got %+v", tok)
		}
		for _, c := range []byte(tok.value) {
			if c <= ' ' || c >= 0x7f || c == ',' || c == '"' {
				t.Errorf("the token has %q in it", c)
			}
		}
		// encoding/json is no stricter, and where it reads the same, it agrees.
		var std struct {
			AccessToken string `json:"access_token"`
		}
		if err := json.Unmarshal(body, &std); err == nil && std.AccessToken != tok.value {
			t.Errorf("got %q, encoding/json has %q", tok.value, std.AccessToken)
		}
	})
}

// FuzzReadError checks that a refusal of whatever bytes is one line, and not a
// long one.
func FuzzReadError(f *testing.F) {
	f.Add(400, "", []byte(`{"error":"invalid_request","error_description":"Identity not found"}`))
	f.Add(500, "Mon, 02 Jan 2006 15:04:05 GMT", []byte(`{"error":{"code":"c","message":"m\n"}}`))
	f.Add(429, "99999999999999999999", []byte(`{"error":7,"correlation_id":"\u0000"}`))
	f.Fuzz(func(t *testing.T, status int, after string, body []byte) {
		resp := &http.Response{StatusCode: status, Header: http.Header{"Retry-After": {after}}}
		resp.Body = readCloser{bytes.NewReader(body)}
		e := readError(resp)
		if text := e.Error() + e.hint(); strings.ContainsAny(text, "\r\n\x00") || len(text) > 4096 {
			t.Errorf("the error is %q", text)
		}
		if e.retryAfter < 0 || e.retryAfter > maxLifetime {
			t.Errorf("retryAfter is %v", e.retryAfter)
		}
	})
}

type readCloser struct{ *bytes.Reader }

func (readCloser) Close() error { return nil }

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	for _, tc := range []struct {
		value, date string
		want        time.Duration
	}{
		{"", "", 0},
		{"0", "", 0},
		{"1", "", time.Second},
		{"86400", "", day},
		{"-1", "", 0},
		{"1.5", "", 0},
		{"soon", "", 0},
		{"99999999999999999999", "", maxLifetime},
		{"-99999999999999999999", "", 0},
		{now.Add(time.Minute).Format(http.TimeFormat), "", time.Minute},
		{now.Add(-time.Minute).Format(http.TimeFormat), "", 0},
		{now.Add(1000 * day).Format(http.TimeFormat), "", maxLifetime},
		// Our clock is an hour behind: the sender's own date tells.
		{now.Add(61 * time.Minute).Format(http.TimeFormat), now.Add(time.Hour).Format(http.TimeFormat), time.Minute},
	} {
		h := http.Header{}
		h.Set("Retry-After", tc.value)
		h.Set("Date", tc.date)
		if got := retryAfter(h, now); got != tc.want {
			t.Errorf("retryAfter(%q, Date %q) = %v, want %v", tc.value, tc.date, got, tc.want)
		}
	}
}

func TestResponseErrorText(t *testing.T) {
	for _, tc := range []struct {
		err  ResponseError
		want string
	}{
		{ResponseError{StatusCode: 503}, "503 Service Unavailable"},
		{ResponseError{StatusCode: 999}, "999"},
		{ResponseError{StatusCode: 400, Code: "invalid_scope"}, "400 invalid_scope"},
		{ResponseError{StatusCode: 400, Code: "x", Description: `say "hi"`, CorrelationID: "7"}, `400 x: "say \"hi\"" (correlation ID 7)`},
	} {
		if got := tc.err.Error(); got != tc.want {
			t.Errorf("got %s, want %s", got, tc.want)
		}
	}
}

func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"a\r\nb\tc":               "a b c",
		"\x1b[31mred":             "[31mred",
		"0123456789abc":           "0123456789...",
		"012345678é":              "012345678...",
		"":                        "",
		fmt.Sprint("\u2028", "x"): "x",
	} {
		if got := printable(in, 10); got != want {
			t.Errorf("printable(%q) = %q, want %q", in, got, want)
		}
	}
}
