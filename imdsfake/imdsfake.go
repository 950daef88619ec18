// Package imdsfake is a fake of Azure's instance metadata service (IMDS), to
// test programs that use managed identities against.
//
// A [Handler] is the service, with the tenant behind it: identities, app
// registrations with their app roles, and who was assigned which. Without a
// socket, it stands in for the transport of a client:
//
//	fake := &imdsfake.Handler{Lifetime: time.Hour}
//	cred := &mitoken.Credential{IMDSTransport: fake}
//
// so it works in a testing/synctest bubble, where months take milliseconds. A
// [Server] is the same on a port, for clients in any language.
//
// It is as strict as the service, or stricter, and its tokens are real: JSON Web
// Tokens (RFC 7519) with the claims that Microsoft Entra gives a managed
// identity, signed with a key that it publishes where Entra does, so that any
// validator can check them:
//
//	/{tenant}/.well-known/openid-configuration
//	/{tenant}/discovery/keys
//
// Outages and other faults are scripted with [Handler.Inject], and
// [Handler.Requests] tells what was asked.
//
// The package is for tests. Mistakes in a Handler panic.
package imdsfake

import (
	"bytes"
	"io"
	"maps"
	"net/http"
	"net/http/httptrace"
	"slices"
	"strconv"
	"sync"
	"time"
)

// A Handler is a fake metadata service and the tenant behind it. It is an
// [http.Handler], and an [http.RoundTripper] that answers whatever host is asked.
//
// The zero value has one system-assigned identity, knows every resource, and
// issues tokens for 24 hours. The fields must not be changed after first use,
// which the methods are for. All methods are safe for concurrent use.
type Handler struct {
	// Tenant is the ID of the directory, a GUID. If empty, DefaultTenant is used.
	Tenant string

	// Identities are those of the host. If nil, there is one, system-assigned
	// and named "host".
	Identities []Identity

	// Apps are the services that tokens can be for. If nil, every resource is
	// known, and has no app roles.
	Apps []App

	// Assignments are the app roles that identities have.
	Assignments []Assignment

	// Lifetime is that of tokens. If zero, it is 24 hours.
	Lifetime time.Duration

	// KeepFor is the age up to which a token is given out again to whoever asks
	// for the same identity and resource, as IMDS does from its cache. If zero,
	// each request gets a new one.
	KeepFor time.Duration

	once   sync.Once
	tenant tenant // set by once

	mu      sync.Mutex // guards what follows
	faults  []*scripted
	journal []Request
	issued  map[issueKey]issuedToken
}

// DefaultTenant is the tenant of a Handler that names none.
const DefaultTenant = "11111111-2222-4333-8444-555555555555"

const tokenPath = "/metadata/identity/oauth2/token"

// A Request is an entry of the journal. It never holds a token. Requests for keys
// and metadata are in it too, and have no Resource.
type Request struct {
	Time      time.Time // when it came
	Method    string
	Path      string
	Resource  string // whom the token was to be for
	Identity  string // as asked for, such as "client_id=..."; empty for the default one
	UserAgent string
	Status    int    // of the answer; 0 if a fault left it without one
	Error     string // the code of an error answer, or the name of the Failure
}

// An answer is what a request gets, over whatever transport.
type answer struct {
	status  int
	header  http.Header
	body    []byte
	failure Failure // that spoils it
}

// ServeHTTP implements [http.Handler].
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a := h.answer(r)
	switch a.failure {
	case Refuse, Reset, Hang:
		reset(w)
	case Truncate:
		a.write(w, len(a.body)/2)
		panic(http.ErrAbortHandler) // which closes the connection
	default:
		a.write(w, len(a.body))
	}
}

// write writes the answer with the first n bytes of its body.
func (a answer) write(w http.ResponseWriter, n int) {
	maps.Copy(w.Header(), a.header)
	w.Header().Set("Content-Length", strconv.Itoa(len(a.body)))
	w.WriteHeader(a.status)
	_, _ = w.Write(a.body[:n]) // a client that has left wants nothing
	_ = http.NewResponseController(w).Flush()
}

// RoundTrip implements [http.RoundTripper]. It answers in memory, and does what
// a transport does for its clients: it honors the context, tells a client trace
// of its connection, and closes the body.
func (h *Handler) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body != nil {
		_ = r.Body.Close()
	}
	if err := h.refuse(r); err != nil {
		return nil, err
	}
	if trace := httptrace.ContextClientTrace(r.Context()); trace != nil && trace.GotConn != nil {
		trace.GotConn(httptrace.GotConnInfo{})
	}
	a := h.answer(r)
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	var body io.Reader = bytes.NewReader(a.body)
	switch a.failure {
	case Refuse, Reset:
		return nil, errReset
	case Truncate:
		body = io.MultiReader(bytes.NewReader(a.body[:len(a.body)/2]), brokenOff{})
	}
	return &http.Response{
		Status:        strconv.Itoa(a.status) + " " + http.StatusText(a.status),
		StatusCode:    a.status,
		Proto:         "HTTP/1.1",
		ProtoMajor:    1,
		ProtoMinor:    1,
		Header:        a.header,
		Body:          io.NopCloser(body),
		ContentLength: int64(len(a.body)),
		Request:       r,
	}, nil
}

// brokenOff is the rest of a body that has been truncated.
type brokenOff struct{}

func (brokenOff) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

// Assign grants app roles. They are in the tokens that are issued from then on.
// It panics if the identity, the app or the role is not there.
func (h *Handler) Assign(assignments ...Assignment) {
	h.once.Do(h.init)
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, a := range assignments {
		h.tenant.assign(a)
	}
}

// Requests returns the journal, oldest first.
func (h *Handler) Requests() []Request {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.journal)
}

// Issuer returns the issuer of the tokens, their iss claim. All Handlers of a
// process sign with one key: what tells their tenants apart is iss and tid, as
// with Entra.
func (h *Handler) Issuer() string {
	h.once.Do(h.init)
	return h.tenant.issuer()
}

func (h *Handler) init() {
	h.tenant = newTenant(h)
	h.issued = map[issueKey]issuedToken{}
}

// answer decides what a request gets, after it has waited as long as a fault
// has it wait, and writes it down.
func (h *Handler) answer(r *http.Request) answer {
	h.once.Do(h.init)
	entry := Request{Time: time.Now(), Method: r.Method, Path: r.URL.Path, UserAgent: r.UserAgent()}
	var a answer
	if r.URL.Path == tokenPath {
		a = h.token(r, &entry)
	} else {
		a = h.published(r)
	}
	entry.Status = a.status
	if a.failure == Refuse || a.failure == Reset || a.failure == Hang {
		entry.Status = 0
	}
	if a.failure != "" {
		entry.Error = string(a.failure)
	}
	h.record(entry)
	return a
}

func (h *Handler) record(entry Request) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.journal = append(h.journal, entry)
}
