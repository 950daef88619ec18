package mitoken

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/aztoso/mitoken/imdsfake"
	"golang.org/x/oauth2"
)

// This file is who sees a token: of all hosts on the way of a request, and of all
// that the package says.

const secret = "eyJhbGciOiJub25lIn0.eyJjYW5hcnkiOiJ0d2VldCJ9.c2lnbmF0dXJl"

// internet is every host there is. Each writes down what it received.
type internet struct {
	redirects map[string]string // by URL without the path: where to
	status    int               // of the redirects

	saw []string // hosts that received the token, with the scheme
}

func (n *internet) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Body != nil {
		_, _ = io.Copy(io.Discard, req.Body)
		req.Body.Close()
	}
	at := req.URL.Scheme + "://" + req.URL.Host
	if strings.Contains(fmt.Sprint(req.Header), secret) {
		n.saw = append(n.saw, at)
	}
	resp := respond(req, 200, "")
	if to, ok := n.redirects[at+req.URL.Path]; ok {
		resp.StatusCode = n.status
		resp.Header.Set("Location", to)
	}
	return resp, nil
}

// withHeader is how net/http's own rules come to bear: the token is in the header
// of the first request, and the client decides who gets it then.
type withHeader struct{ base http.RoundTripper }

func (w withHeader) RoundTrip(req *http.Request) (*http.Response, error) {
	return w.base.RoundTrip(req)
}

// TestWhoSeesAToken follows redirects with three clients: ours, x/oauth2's, and
// net/http's with the header set by hand. Only what is listed may see the token.
// That the others let more of them see it is what this package is for.
func TestWhoSeesAToken(t *testing.T) {
	const api = "https://api.example.com"
	for _, tc := range []struct {
		name string
		hops []string // where it is led to, one after the other
		ours string   // who sees the token beside api itself; "+" stands for each hop
		oa2  string
		std  string
	}{
		{"the same host", []string{api + "/b"}, "+", "+", "+"},
		{"another path and query", []string{api + "/b?c=d#e"}, "+", "+", "+"},
		{"another host", []string{"https://evil.example/"}, "", "+", ""},
		{"a subdomain", []string{"https://x.api.example.com/"}, "", "+", "+"},
		{"the parent domain", []string{"https://example.com/"}, "", "+", ""},
		{"a host with the same beginning", []string{"https://api.example.com.evil.example/"}, "", "+", ""},
		{"another port", []string{api + ":8443/"}, "", "+", "+"},
		{"the default port, written out", []string{api + ":443/"}, "+", "+", "+"},
		{"a downgrade to http", []string{"http://api.example.com/"}, "", "+", "+"},
		{"a downgrade on the same port", []string{"http://api.example.com:443/"}, "", "+", "+"},
		{"userinfo, which is an Authorization of its own", []string{"https://user:word@api.example.com/"}, "", "+", "+"},
		{"the host as userinfo", []string{"https://api.example.com@evil.example/"}, "", "+", ""},
		{"a trailing dot", []string{"https://api.example.com./"}, "", "+", ""},
		{"upper case", []string{"https://API.EXAMPLE.COM/b"}, "+", "+", ""},
		{"punycode", []string{"https://xn--pi-7ia.example.com/"}, "", "+", ""},
		{"letters that look alike", []string{"https://аpi.example.com/"}, "", "+", ""},
		{"an IPv6 address with a zone", []string{"https://[fe80::1%25eth0]/"}, "", "+", ""},
		{"another host and back", []string{"https://evil.example/", api + "/c"}, "", "++", ""},
		{"a subdomain and back", []string{"https://x.api.example.com/", api + "/c"}, "", "++", "++"},
		{"two others", []string{"https://a.example/", "https://b.example/"}, "", "++", ""},
	} {
		for _, status := range []int{301, 302, 303, 307, 308} {
			for _, body := range []string{"", "body"} {
				for _, client := range []struct {
					name string
					with func(http.RoundTripper) http.RoundTripper
					want string
				}{
					{"ours", func(base http.RoundTripper) http.RoundTripper {
						cred := &Credential{Upstream: &fixed{azcore.AccessToken{Token: secret, ExpiresOn: time.Now().Add(day)}}}
						t.Cleanup(func() { cred.Close() })
						return &Transport{Source: cred.TokenSource(api), Base: base}
					}, tc.ours},
					{"x/oauth2", func(base http.RoundTripper) http.RoundTripper {
						return &oauth2.Transport{Source: oauth2.StaticTokenSource(&oauth2.Token{AccessToken: secret}), Base: base}
					}, tc.oa2},
					{"net/http", func(base http.RoundTripper) http.RoundTripper { return withHeader{base} }, tc.std},
				} {
					n := &internet{status: status, redirects: map[string]string{}}
					from := api + "/start"
					want := []string{api}
					for i, to := range tc.hops {
						n.redirects[from] = to
						u := must(http.NewRequest("GET", to, nil)).URL
						from = u.Scheme + "://" + u.Host + u.Path
						if len(client.want) > i {
							want = append(want, u.Scheme+"://"+u.Host)
						}
					}
					var content io.Reader
					method := http.MethodGet
					if body != "" {
						content, method = strings.NewReader(body), http.MethodPost
					}
					req := must(http.NewRequest(method, api+"/start", content))
					if client.name == "net/http" {
						req.Header.Set("Authorization", "Bearer "+secret)
					}
					resp, err := (&http.Client{Transport: client.with(n)}).Do(req)
					if err != nil {
						t.Fatal(err)
					}
					resp.Body.Close()
					if !slices.Equal(n.saw, want) {
						t.Errorf("%s, %d, body %q, %s: the token was seen by %q, want %q", tc.name, status, body, client.name, n.saw, want)
					}
				}
			}
		}
	}
}

// A canary is whatever could sing: all that the package says, in all ways of saying
// it.
type canary struct {
	mu   sync.Mutex
	said bytes.Buffer
}

func (c *canary) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.said.Write(b)
}

// hear has a value said with each verb and encoding, and each error in its chain.
func (c *canary) hear(v any) {
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
		fmt.Fprintf(c, verb+"\n", v)
	}
	for _, encode := range []func(any) ([]byte, error){json.Marshal, xml.Marshal, func(v any) ([]byte, error) {
		var b bytes.Buffer
		err := gob.NewEncoder(&b).Encode(v)
		return b.Bytes(), err
	}} {
		text, err := encode(v)
		fmt.Fprintf(c, "%s %v\n", text, err)
	}
	if err, ok := v.(error); ok {
		c.chain(err)
	}
}

func (c *canary) chain(err error) {
	switch e := err.(type) {
	case interface{ Unwrap() error }:
		if inner := e.Unwrap(); inner != nil {
			c.hear(inner)
		}
	case interface{ Unwrap() []error }:
		for _, inner := range e.Unwrap() {
			c.hear(inner)
		}
	}
}

// sings reports which form of the secret was said.
func (c *canary) sings() (forms []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	text := c.said.String()
	for _, part := range append(strings.Split(secret, "."), secret) {
		for name, form := range map[string]string{
			"itself": part, "base64": base64.StdEncoding.EncodeToString([]byte(part)), "hex": hex.EncodeToString([]byte(part)),
			"HEX": strings.ToUpper(hex.EncodeToString([]byte(part))), "bytes": strings.Trim(fmt.Sprint([]byte(part)), "[]"),
		} {
			if strings.Contains(text, form) {
				forms = append(forms, part+" as "+name)
			}
		}
	}
	return forms
}

// TestCanary has a marked token in every answer, in every fault that there is, and
// listens to all that comes of it.
func TestCanary(t *testing.T) {
	marked := map[string]any{"access_token": secret}
	faults := []imdsfake.Fault{
		{Fields: marked},
		{Fields: map[string]any{"access_token": secret, "expires_on": "never"}},
		{Fields: map[string]any{"access_token": secret, "expires_on": 7}},
		{Fields: map[string]any{"access_token": secret, "token_type": "mac " + secret}},
		{Fields: map[string]any{"access_token": secret, "resource": "other"}},
		{Fields: map[string]any{"access_token": secret + "\r\n"}},
		{Fields: map[string]any{"access_token": secret + " " + strings.Repeat("x", 20)}},
		{Fields: map[string]any{"access_token": []any{secret}}},
		{Fields: marked, Header: map[string]string{"Content-Type": "text/html"}},
		{Fields: marked, Gzip: true},
		{Fields: marked, Pad: 1 << 20},
		{Fields: marked, Failure: imdsfake.Truncate},
		{Fields: marked, Failure: imdsfake.Truncate, After: 60},
		{Fields: marked, Failure: imdsfake.ResetBody},
		{Status: 200, Body: secret},
		{Status: 200, Body: `{"access_token":"` + secret + `","access_token":1}`},
		{Status: 200, Body: `{"access_token":"` + secret},
		{Status: 204, Body: `{"access_token":"` + secret + `"}`},
		{Status: 302, Body: `{"access_token":"` + secret + `"}`, Header: map[string]string{"Location": "http://127.0.0.1/?" + secret}},
		{Status: 400, Body: `{"error":"` + "invalid_request" + `","access_token":"` + secret + `"}`},
		{Status: 500, Body: secret}, {Status: 503, Body: `{"access_token":"` + secret + `"}`},
		{Failure: imdsfake.Refuse}, {Failure: imdsfake.Reset}, {Failure: imdsfake.Hang},
	}
	for _, format := range []string{ // an answer that is nearly one
		`{"access_token":"%s x","expires_on":"%d"}`,
		`{"access_token":"a","Access_Token":"%s","expires_on":"%d"}`,
		`{"access_token":"a","%s":"%d","%[1]s":""}`,
		`{"access_token":"%s","expires_on":"%d"`,
		`{"access_token":"%s","expires_on":"%d"} x`,
		`["%s", %d]`,
		`{"access_token":"a","expires_on":"%s%d"}`,
		`{"access_token":"%s","expires_on":"1%d"}`,
		`{"access_token":"%s","expires_on":"%d","token_type":"%[1]s"}`,
	} {
		faults = append(faults, imdsfake.Fault{Status: 200, Body: fmt.Sprintf(format, secret, 946684800+5*86400)})
	}
	for i, fault := range faults {
		for _, has := range []bool{false, true} { // a good token already
			t.Run(fmt.Sprint(i, " ", has), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					c := &canary{}
					fake := &imdsfake.Handler{Cache: imdsfake.NoCache}
					cred := &Credential{
						IMDSTransport: fake,
						Logger:        slog.New(slog.NewJSONHandler(c, &slog.HandlerOptions{Level: slog.LevelDebug, AddSource: true})),
						Observe:       func(e Event) { c.hear(e) },
					}
					src := cred.TokenSource("https://x.example")
					if has {
						fake.Inject(imdsfake.Fault{Fields: marked, Times: 1})
						if tok, err := src.Token(); err != nil || tok.AccessToken != secret {
							t.Fatalf("got %v", err)
						}
					}
					fake.Inject(fault)
					tr := &Transport{Source: src, Base: roundTripper(func(req *http.Request) (*http.Response, error) {
						resp := respond(req, 401, "")
						resp.Header.Set("WWW-Authenticate", `Bearer error="invalid_token"`)
						return resp, nil
					})}
					client := &http.Client{Transport: tr, Timeout: time.Minute}
					for range 3 {
						resp, err := client.Get("https://x.example/")
						c.hear(err)
						if err == nil {
							c.hear(resp)
							c.hear(resp.Request)
							resp.Body.Close()
						}
						_, err = cred.GetToken(t.Context(), policy.TokenRequestOptions{Scopes: []string{"https://x.example/.default"},
							Claims: "{}", TenantID: "t"})
						c.hear(err)
						_, err = client.Get("https://elsewhere.example/")
						c.hear(err)
						time.Sleep(7 * time.Hour)
					}
					cred.Close()
					synctest.Wait()
					for _, v := range []any{src.Status(), cred, *src, src, tr, client} {
						c.hear(v)
					}
					if forms := c.sings(); forms != nil {
						t.Errorf("%+v: the token is in what is said: %q", fault, forms)
					}
				})
			})
		}
	}
}

// Panics of an issuer, of a hook and of a base with the token in them say nothing of
// it.
func TestCanaryPanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &canary{}
		logger := slog.New(slog.NewTextHandler(c, nil))
		for _, cred := range []*Credential{
			{Logger: logger, Upstream: bomb{}},
			{Logger: logger, IMDSTransport: roundTripper(func(*http.Request) (*http.Response, error) { panic(secret) })},
			{Logger: logger, IMDSTransport: &imdsfake.Handler{}, Observe: func(Event) { panic(errors.New(secret)) }},
		} {
			_, err := cred.TokenSource("r").Token()
			c.hear(err)
			synctest.Wait()
			c.hear(cred.TokenSource("r").Status())
			cred.Close()
		}
		if forms := c.sings(); forms != nil || !strings.Contains(c.said.String(), "panic of type") {
			t.Errorf("the token is in what is said: %q", forms)
		}
	})
}

type bomb struct{}

func (bomb) GetToken(context.Context, policy.TokenRequestOptions) (azcore.AccessToken, error) {
	panic(fmt.Sprintf("cannot parse %s", secret))
}

// That the canary would sing is tried on values that are meant to be told.
func TestCanaryCanSing(t *testing.T) {
	for _, v := range []any{&oauth2.Token{AccessToken: secret}, secret, []byte(secret), errors.New(secret), fmt.Errorf("a: %w", errors.New(secret))} {
		c := &canary{}
		c.hear(v)
		if c.sings() == nil {
			t.Errorf("nothing was heard of a %T", v)
		}
	}
}
