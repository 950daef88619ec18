package mitoken

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/oauth2"
)

// A Transport is an [http.RoundTripper] that adds a bearer token to requests
// (RFC 6750, section 2.1), and sends it to the origins it is meant for only.
//
// A request that a redirect leads elsewhere travels on without a token. One that
// was meant for elsewhere from the start is an [*OriginError], before any token
// is asked for. One that has an Authorization header is left as it is.
//
// A Transport must not be copied, nor its fields be changed, after its first
// use. It is safe for concurrent use.
type Transport struct {
	// Source supplies the tokens. If it is a [*TokenSource], the context of a
	// request ends its wait for one; another source is waited for as long as it
	// takes.
	Source oauth2.TokenSource

	// Base makes the requests. If nil, [http.DefaultTransport] is used.
	Base http.RoundTripper

	// Origins are who may get a token, as scheme, host and port:
	// "https://api.example.com", "https://api.example.com:8443". All three must
	// match; a host is not its subdomains. The scheme must be https, or http for
	// a loopback address.
	//
	// If empty, it is the origin of the resource of a [*TokenSource], which must
	// be an https URL then.
	Origins []string

	// PassUnauthorized leaves an answer of 401 to the caller, and that is all.
	// Without it, one that says that the token is invalid (error="invalid_token",
	// RFC 6750, section 3.1) has a [*TokenSource] ask for another token, once in
	// five minutes at most. If one comes, and the body of the request can be sent
	// again (see Request.GetBody), the request is sent once more, and its second
	// answer is the one that counts. A token is kept whatever a service says of it.
	PassUnauthorized bool

	once    sync.Once
	origins []origin               // set by once
	err     error                  // of the fields; set by once
	last    atomic.Pointer[bearer] // of a Source that is not a *TokenSource
}

// RoundTrip implements [http.RoundTripper]. It does not modify the request, and
// closes its body whatever comes. The response is that of Base, whose Request is
// req, without a token. What a 401 leads to, PassUnauthorized says.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	bare, err := t.check(req)
	if err == nil && !bare {
		var header string
		if header, err = t.header(req.Context()); err == nil {
			resp, err := t.send(req, header)
			if resp != nil && resp.StatusCode == http.StatusUnauthorized && !t.PassUnauthorized {
				return t.retry(req, resp, header), nil
			}
			return resp, err
		}
	}
	if err != nil {
		if req.Body != nil {
			_ = req.Body.Close()
		}
		return nil, err
	}
	resp, err := t.base().RoundTrip(req)
	if resp != nil && resp.Request == nil {
		resp.Request = req // strayed follows it
	}
	return resp, err
}

// check reports whether a request is to go without a token, or not at all.
func (t *Transport) check(req *http.Request) (bare bool, err error) {
	if len(req.Header["Authorization"]) > 0 {
		return true, nil
	}
	t.once.Do(t.init)
	switch {
	case t.err != nil:
		return false, t.err
	case req.URL == nil:
		return false, errors.New("mitoken: the request has no URL")
	case t.allowed(req) && !t.strayed(req):
		return false, nil
	case req.Response != nil: // set by http.Client where it follows a redirect
		return true, nil
	}
	return false, &OriginError{Origin: req.URL.Scheme + "://" + req.URL.Host}
}

// allowed reports whether a token may go where a request does. The Host header
// counts as well: behind a shared front it is what decides.
func (t *Transport) allowed(req *http.Request) bool {
	return t.listed(req.URL.Scheme, req.URL.Host) &&
		(req.Host == "" || req.Host == req.URL.Host || t.listed(req.URL.Scheme, req.Host))
}

// strayed reports whether a redirect has led a request to where no token may go
// before. It stays without one then, as net/http has it: a stranger must not
// choose what is asked with a token.
func (t *Transport) strayed(req *http.Request) bool {
	for resp := req.Response; resp != nil && resp.Request != nil; resp = resp.Request.Response {
		if !t.allowed(resp.Request) {
			return true
		}
	}
	return false
}

func (t *Transport) listed(scheme, host string) bool {
	for _, o := range t.origins {
		if o.is(scheme, host) {
			return true
		}
	}
	return false
}

// send sends a request with a token. The copy shares with the caller's request
// all that a RoundTripper has no business to write to: this costs three
// allocations, where Request.Clone and a string for each request cost seven.
func (t *Transport) send(req *http.Request, header string) (*http.Response, error) {
	out := &struct {
		http.Request
		value [1]string
	}{*req, [1]string{header}}
	out.Header = maps.Clone(req.Header)
	if out.Header == nil {
		out.Header = http.Header{}
	}
	out.Header["Authorization"] = out.value[:]
	resp, err := t.base().RoundTrip(&out.Request)
	if resp != nil {
		resp.Request = req // without the token, for those who log it
	}
	return resp, err
}

// retry sends a request once more, if its token was refused and there is another
// one, and returns the answer that counts.
func (t *Transport) retry(req *http.Request, resp *http.Response, header string) *http.Response {
	s, ok := t.Source.(*TokenSource)
	if !ok || !refusesToken(resp.Header) {
		return resp
	}
	again := *req
	switch {
	case req.Body == nil, req.Body == http.NoBody:
	case req.GetBody == nil:
		s.entry.suspect(header) // for the next one
		return resp
	}
	h := s.entry.replace(req.Context(), header)
	if h == nil {
		return resp
	}
	if req.GetBody != nil {
		body, err := req.GetBody()
		if err != nil {
			return resp
		}
		again.Body = body
	}
	second, err := t.send(&again, h.header)
	if err != nil {
		return resp // which is an answer, at least
	}
	// A connection whose body has been read to the end can be used again.
	_, _ = io.CopyN(io.Discard, resp.Body, maxAnswer)
	_ = resp.Body.Close()
	second.Request = req
	return second
}

// CloseIdleConnections closes those of Base. [http.Client.CloseIdleConnections]
// calls it.
func (t *Transport) CloseIdleConnections() {
	if c, ok := t.base().(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}

// header returns the value of the Authorization header.
func (t *Transport) header(ctx context.Context) (string, error) {
	if s, ok := t.Source.(*TokenSource); ok {
		h, err := s.held(ctx)
		if err != nil {
			return "", err
		}
		return h.header, nil
	}
	tok, err := t.Source.Token()
	if err == nil {
		if b := t.last.Load(); b != nil && b.token == tok {
			return b.header, nil
		}
		err = checkBearer(tok)
	}
	if err != nil {
		return "", fmt.Errorf("mitoken: Transport.Source: %w", err)
	}
	b := &bearer{tok, "Bearer " + tok.AccessToken}
	t.last.Store(b)
	return b.header, nil
}

// checkBearer returns what keeps a foreign token from a header.
func checkBearer(tok *oauth2.Token) error {
	switch {
	case tok == nil:
		return errors.New("there is no token")
	case !strings.EqualFold(tok.Type(), "Bearer"):
		return errors.New("token_type is not Bearer")
	}
	return checkToken(tok.AccessToken)
}

// A bearer is a token with its header, which is built once per token.
type bearer struct {
	token  *oauth2.Token
	header string
}

func (t *Transport) base() http.RoundTripper {
	if t.Base != nil {
		return t.Base
	}
	return http.DefaultTransport
}

// init makes the list of origins.
func (t *Transport) init() {
	if s, ok := t.Source.(*TokenSource); t.Source == nil || ok && s == nil {
		t.err = errors.New("mitoken: Transport.Source is nil")
		return
	}
	for _, s := range t.Origins {
		o, err := parseOrigin(s)
		if err != nil {
			t.err = fmt.Errorf("mitoken: Transport.Origins: %w", err)
			return
		}
		t.origins = append(t.origins, o)
	}
	if len(t.Origins) == 0 {
		t.origins, t.err = resourceOrigin(t.Source)
	}
}

// resourceOrigin returns the origin of a source's resource.
func resourceOrigin(src oauth2.TokenSource) ([]origin, error) {
	s, ok := src.(*TokenSource)
	if !ok {
		return nil, errors.New("mitoken: Transport.Origins is empty: " +
			"who may get the tokens of Transport.Source?")
	}
	if s.entry == nil {
		return nil, s.misuse()
	}
	resource := s.entry.resource
	u, err := url.Parse(resource)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("mitoken: Transport.Origins is empty, "+
			"and the resource %q is not an https URL to stand in for it", resource)
	}
	o, err := parseOrigin(u.Scheme + "://" + u.Host)
	if err != nil {
		return nil, fmt.Errorf("mitoken: Transport.Origins is empty, and in place of it %w", err)
	}
	return []origin{o}, nil
}

// An origin is a scheme, a host and a port (RFC 6454, section 4), in lower case
// and with the port written out.
type origin struct {
	scheme, host, port string
}

// parseOrigin parses an origin that may get a token.
func parseOrigin(s string) (origin, error) {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.Hostname() == "" || u.User != nil ||
		strings.TrimSuffix(u.Path, "/")+u.RawQuery+u.Fragment != "" {
		return origin{}, fmt.Errorf("%q is not of the form https://host or https://host:port", s)
	}
	o := origin{u.Scheme, strings.ToLower(u.Hostname()), portOf(u.Scheme, u.Port())}
	switch {
	case !isASCII(o.host):
		return origin{}, fmt.Errorf("%q is not in ASCII: write the host's xn-- form", s)
	case o.scheme == "https", o.scheme == "http" && isLoopback(o.host):
		return o, nil
	}
	return origin{}, fmt.Errorf("%q is neither https nor a loopback address: "+
		"a token would cross the network in clear text", s)
}

// is reports whether a request with this scheme and host, as in a URL, goes to
// the origin.
func (o origin) is(scheme, host string) bool {
	u := url.URL{Host: host}
	return scheme == o.scheme && isASCII(host) && strings.EqualFold(u.Hostname(), o.host) &&
		portOf(scheme, u.Port()) == o.port
}

func portOf(scheme, port string) string {
	switch {
	case port != "":
		return port
	case scheme == "https":
		return "443"
	}
	return "80"
}

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= 0x80 {
			return false
		}
	}
	return true
}

// An OriginError is the refusal of a [Transport] to send a token where it is not
// meant to go. Use [errors.As] to get at it.
type OriginError struct {
	Origin string // scheme, host and port of the request
}

func (e *OriginError) Error() string {
	return fmt.Sprintf("mitoken: no token goes to %q: Transport.Origins does not list it", e.Origin)
}
