// Quickstart tells in one run what mitoken is for: a daemon calls a protected
// service as its managed identity, without a secret, thousands of times on one
// token, through a refresh and through an outage of the metadata service.
//
//	go run ./examples/quickstart
//
// It needs no Azure: the tenant and its metadata service are package imdsfake.
// The service is real: it checks each token as one in production must, with the
// guard of examples/protectedservice. Whatever the output claims has been checked;
// if something does not hold, the last line says what, and the exit code is 1.
package main

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"github.com/aztoso/mitoken"
)

const (
	calls   = 5000 // of step 4
	callers = 50   // goroutines that make them
)

func main() {
	if err := run(os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "quickstart:", err)
		os.Exit(1)
	}
}

// run tells the story, and returns the first thing in it that does not hold.
func run(w io.Writer) error {
	azure, err := newSite(24 * time.Hour)
	if err != nil {
		return err
	}
	defer azure.close()
	r := &report{w: w}
	fmt.Fprint(w, "A daemon calls a protected service as its managed identity: no secret anywhere.\n",
		"Azure's part is played by package imdsfake. All of it runs on this machine.\n")
	for _, step := range []func(*site, *report) error{
		showClaims, admit, refuse, shareToken, endure,
	} {
		if err := step(azure, r); err != nil {
			return fmt.Errorf("step %d does not hold: %w", r.steps, err)
		}
	}
	fmt.Fprintln(w, "\nAll of this was checked and held. On Azure, the same code needs no Endpoint.")
	return nil
}

// showClaims gets a token, and prints what is in it.
func showClaims(s *site, r *report) error {
	r.headline("The daemon asks its host's metadata service for a token, and gets these claims")
	cred := mitoken.Credential{Endpoint: s.imds.URL}
	defer cred.Close()
	tok, err := cred.TokenSource(resource).Token()
	if err != nil {
		return err
	}
	c, err := decode(tok.AccessToken)
	if err != nil {
		return err
	}
	lifetime := time.Duration(c.Expiry-c.IssuedAt) * time.Second
	r.fact("aud", "%-36s  the service it is for", c.Audience)
	r.fact("iss", "%s  the tenant", c.Issuer)
	r.fact("appid", "%-36s  who the daemon is", c.AppID)
	r.fact("oid", "%-36s  who it is in the tenant", c.ObjectID)
	r.fact("roles", "%-36s  what it may do there", strings.Join(c.Roles, " "))
	r.fact("exp - iat", "%-36v  how long it is good for", lifetime)
	switch {
	case c.Audience != resource || c.Issuer != s.azure.Issuer():
		return fmt.Errorf("aud is %q, iss is %q", c.Audience, c.Issuer)
	case c.AppID != daemonID || !slices.Equal(c.Roles, []string{role}):
		return fmt.Errorf("appid is %q, roles are %q", c.AppID, c.Roles)
	case lifetime < 24*time.Hour:
		return fmt.Errorf("the lifetime is %v", lifetime)
	}
	return nil
}

// claims are some of those in a token of Entra.
type claims struct {
	AppID    string   `json:"appid"`
	ObjectID string   `json:"oid"`
	Roles    []string `json:"roles"`
	Audience string   `json:"aud"`
	Issuer   string   `json:"iss"`
	IssuedAt int64    `json:"iat"`
	Expiry   int64    `json:"exp"`
}

// decode returns the claims of a token to show them. Clients should not decide
// by them, and services must verify the token first: see package guard.
func decode(token string) (claims, error) {
	var c claims
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return c, errors.New("the token is not a JWT")
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(payload, &c)
	}
	return c, err
}

// admit makes a call with the role.
func admit(s *site, r *report) error {
	r.headline("The service checks signature, issuer, audience, tenant and role, and lets it in")
	cred := mitoken.Credential{Endpoint: s.imds.URL}
	defer cred.Close()
	resp, err := s.client(cred.TokenSource(resource)).Get(s.origin)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	r.fact("role", "%s, %q", resp.Status, body)
	if resp.StatusCode != http.StatusOK || string(body) != "hello, "+daemonID {
		return errors.New("the daemon has the role, and was not let in")
	}
	return nil
}

// refuse makes calls that must not get through.
func refuse(s *site, r *report) error {
	r.headline("It turns away everybody else")
	guest := mitoken.Credential{Endpoint: s.imds.URL, ID: azidentity.ClientID(guestID)}
	defer guest.Close()
	tok, err := guest.TokenSource(resource).Token()
	if err != nil {
		return err
	}
	for _, c := range []struct {
		who, header string
		want        int
	}{
		{"no token", "", http.StatusUnauthorized},
		{"altered", "Bearer " + altered(tok.AccessToken), http.StatusUnauthorized},
		{"no role", "Bearer " + tok.AccessToken, http.StatusForbidden},
	} {
		resp, err := s.get(c.header)
		if err != nil {
			return err
		}
		challenge := resp.Header.Get("WWW-Authenticate")
		_, code, _ := strings.Cut(challenge, ", ")
		r.fact(c.who, "%s %s", resp.Status, code)
		if resp.StatusCode != c.want || challenge == "" {
			return fmt.Errorf("%s: want %d and a challenge", c.who, c.want)
		}
	}
	return nil
}

// altered returns a token with one character of its signature changed.
func altered(token string) string {
	at := strings.LastIndexByte(token, '.') + 1
	other := "A"
	if token[at] == 'A' {
		other = "B"
	}
	return token[:at] + other + token[at+1:]
}

// shareToken makes many calls at once, from an empty cache on.
func shareToken(s *site, r *report) error {
	r.headline("%s calls by %d goroutines cost the metadata service one request",
		thousands(calls), callers)
	cred := mitoken.Credential{Endpoint: s.imds.URL}
	defer cred.Close()
	client := s.client(cred.TokenSource(resource))
	asked, start := s.requests(), time.Now()
	t := burst(calls, callers, func() error { return s.call(client) })
	took := time.Since(start)
	asked = s.requests() - asked
	r.fact("requests", "%d to the metadata service", asked)
	r.fact("calls", "%s in %.1f s: %s a second, the slowest %d ms", thousands(t.calls),
		took.Seconds(), thousands(int(float64(t.calls)/took.Seconds())), t.slowest.Milliseconds())
	switch {
	case t.failed > 0:
		return fmt.Errorf("%d calls failed, the first: %w", t.failed, t.err)
	case asked != 1:
		return fmt.Errorf("the metadata service was asked %d times", asked)
	}
	return nil
}
