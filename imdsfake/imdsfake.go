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
// [Server] is the same on a port, for clients in any language. The program
// imdsfake/cmd/imdsfake is a server with a configuration file and a page.
//
// It is as strict as the service, or stricter, and its tokens are real: JSON Web
// Tokens (RFC 7519) with the claims that Microsoft Entra gives a managed
// identity, signed with a key that it publishes where Entra does, so that any
// validator can check them. It is, at one address:
//
//   - IMDS: /metadata/identity/oauth2/token and /metadata/instance,
//   - what hosts of other kinds have in place of IMDS: see [Host] and [Handler.Env],
//   - Entra's keys and metadata, for tokens of version 1 and 2:
//     /{tenant}/.well-known/openid-configuration, /{tenant}/discovery/keys and
//     their like with v2.0 in them,
//   - Entra's token endpoint for service principals, /{tenant}/oauth2/v2.0/token,
//   - the calls of Microsoft Graph that assign app roles, in /v1.0/servicePrincipals.
//
// Outages and other faults are scripted with [Handler.Inject], and
// [Handler.Requests] tells what was asked and what was answered.
//
// The package is for tests. Mistakes in a Handler panic, unless [Handler.Check]
// is asked first.
package imdsfake

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptrace"
	"strconv"
	"strings"
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

	// ServicePrincipals are programs elsewhere, which get tokens from Entra itself.
	ServicePrincipals []ServicePrincipal

	// Apps are the services that tokens can be for. Microsoft Graph is always
	// one. If nil, every resource is known, and has no app roles.
	Apps []App

	// Assignments are the app roles that identities have.
	Assignments []Assignment

	// Lifetime is that of tokens. If zero, it is 24 hours, and one hour for those
	// of service principals.
	Lifetime time.Duration

	// Cache is how long a token is given out again to whoever asks for the same
	// identity and resource. If empty, it is UntilExpiry, as documented.
	Cache Cache

	// Limits are how many requests IMDS takes. If zero, there are none.
	Limits Limits

	// Secret is the value of IDENTITY_HEADER and MSI_SECRET, by which hosts other
	// than virtual machines know their own processes. If empty, one is made up.
	Secret string

	// KeyDir is where the key files of Azure Arc are written. If empty, it is the
	// one place where clients read them: on Linux, /var/opt/azcmagent/tokens.
	KeyDir string

	once   sync.Once
	wrong  error  // set by once, like tenant and secret
	tenant tenant // its assignments are guarded by mu
	secret string
	drawns sync.Map // *draw, by the tickets of requests on their way to a Server

	mu      sync.Mutex // guards what follows
	faults  []*scripted
	journal journal
	cache   map[cacheKey]*cached
	load    load
	keys    []*signingKey // the newest one first; empty as long as that of the process signs
	tokens  []Token
	arcKeys []arcKey
}

// DefaultTenant is the tenant of a Handler that names none.
const DefaultTenant = "11111111-2222-4333-8444-555555555555"

// A call is a request, as far as all that answer requests want to know of it.
type call struct {
	*http.Request
	protocol *protocol // nil if it is not for a token
	query    parameters
	selector string // the parameter that selects an identity, if any
	again    bool   // it has been seen before: net/http has sent it once more
	proof    string // how the client proved who it is: the appidacr claim
	entry    Request
}

// An answer is what a request gets, over whatever transport.
type answer struct {
	status int
	header http.Header
	body   []byte
	spoil  Fault // what is done to it on its way
}

// ServeHTTP implements [http.Handler].
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := h.newCall(r)
	leave, ok := h.enter(c)
	if !ok {
		h.putBack(c)
		h.limited(c).write(w, r)
		return
	}
	defer leave()
	h.answer(c, h.drawn(c)).write(w, r)
}

// RoundTrip implements [http.RoundTripper]. It answers in memory, and does what
// a transport does for its clients: it honors the context, tells a client trace
// of its connection, and closes the body.
func (h *Handler) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Body != nil {
		defer r.Body.Close()
		stop := context.AfterFunc(r.Context(), func() { r.Body.Close() }) // or a read of it might not end
		defer stop()
	}
	if err := sendable(r); err != nil {
		return nil, err
	}
	c := h.newCall(r)
	leave, ok := h.enter(c)
	if !ok {
		return h.limited(c).response(r), nil
	}
	defer leave()
	f, _ := h.draw(c)
	if f.Failure == Refuse {
		return nil, h.refuse(c, f)
	}
	if trace := httptrace.ContextClientTrace(r.Context()); trace != nil && trace.GotConn != nil {
		trace.GotConn(httptrace.GotConnInfo{})
	}
	a := h.answer(c, f)
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	if a.spoil.Failure == Reset {
		return nil, errReset
	}
	return a.response(r), nil
}

// sendable returns why a transport would not send a request.
func sendable(r *http.Request) error {
	if r.URL == nil {
		return errors.New("imdsfake: the request has no URL")
	}
	return r.Context().Err()
}

// response is the answer as a transport has it.
func (a answer) response(r *http.Request) *http.Response {
	body := io.NopCloser(a.reader(r.Context()))
	if r.Method == http.MethodHead || a.status == http.StatusNoContent || a.status == http.StatusNotModified {
		body = http.NoBody
	}
	return &http.Response{
		Status:        strconv.Itoa(a.status) + " " + http.StatusText(a.status),
		StatusCode:    a.status,
		Proto:         "HTTP/1.1",
		ProtoMajor:    1,
		ProtoMinor:    1,
		Header:        a.header,
		Body:          body,
		ContentLength: int64(len(a.body)),
		Request:       r,
	}
}

// newCall finds out what a request is about.
func (h *Handler) newCall(r *http.Request) *call {
	h.ready()
	c := &call{Request: r}
	c.entry = Request{Time: time.Now(), Method: r.Method, Path: r.URL.Path, UserAgent: r.UserAgent()}
	c.protocol, c.proof = protocols[r.URL.Path], "2" // by a certificate
	if r.URL.Path == "/"+h.tenant.id+entraPath {
		c.protocol = entra
	}
	if c.protocol == nil {
		if strings.HasPrefix(r.URL.Path, "/metadata/") {
			c.entry.Host = IMDS
		}
		return c
	}
	c.query = readParameters(c)
	c.selector = c.protocol.selected(c.query)
	c.entry.Host = c.protocol.host
	c.entry.Resource = c.query.get("resource")
	if c.protocol == entra {
		c.entry.Resource = scopeResource(c.query.get("scope"))
	}
	if c.selector != "" {
		c.entry.Identity = c.selector + "=" + c.query.get(c.selector)
	}
	return c
}

// answer decides what a request gets, after it has waited as long as a fault has
// it wait, and writes it down.
func (h *Handler) answer(c *call, f Fault) answer {
	if f.Failure == Hang {
		h.journalize(c, c.failed(f))
		<-c.Context().Done()
		return answer{spoil: f}
	}
	a, ok := f.befall(c)
	if !ok {
		a = h.route(c)
		c.entry.Status = a.status
		a.spoil = f
		a = a.garble()
	}
	switch {
	case a.spoil.Failure != "":
		h.journalize(c, c.failed(a.spoil))
	case f.garbles() && !ok:
		c.entry.Reason += ", garbled by a fault"
		fallthrough
	default:
		h.journalize(c, c.entry)
	}
	return a
}

// limited is the answer to a request that is one too many.
func (h *Handler) limited(c *call) answer {
	a := refusal(c, statusProblem(http.StatusTooManyRequests))
	h.journalize(c, c.entry)
	return a
}

// route answers a request that no fault keeps from it.
func (h *Handler) route(c *call) answer {
	switch path := c.URL.Path; {
	case c.protocol != nil:
		return h.token(c)
	case strings.HasPrefix(path, "/metadata/"):
		return h.metadata(c)
	case path == graphPath, strings.HasPrefix(path, graphPath+"/"), strings.HasPrefix(path, graphPath+"("):
		return h.graph(c)
	}
	return h.published(c)
}

// problem is what is wrong with a request.
type problem struct {
	status int
	code   string // as IMDS has it
	text   string
	kind   kind        // for protocols that have other codes
	header http.Header // of the answer
}

// kind is what a problem is about, where that matters.
type kind int

const (
	_ kind = iota
	noSecret
	wrongSecret
	noResource
	unknownResource
	badVersion
	noIdentity
)

// refusal is the answer with an error as IMDS writes it.
func refusal(c *call, p *problem) answer {
	c.entry.Status, c.entry.Error, c.entry.Reason = p.status, p.code, p.text
	write := writeError
	if c.protocol != nil {
		write = c.protocol.refuse
	}
	a := jsonAnswer(p.status, write(p))
	for name, values := range p.header {
		a.header[name] = values
	}
	return a
}

// writeError is the error of RFC 6749, section 5.2, which IMDS writes.
func writeError(p *problem) any {
	return map[string]string{"error": p.code, "error_description": p.text}
}

func jsonAnswer(status int, v any) answer {
	body, err := json.Marshal(v)
	if err != nil {
		panic("imdsfake: " + err.Error()) // our own values always encode
	}
	h := http.Header{}
	h.Set("Content-Type", "application/json; charset=utf-8")
	h.Set("Server", "imdsfake")
	return answer{status: status, header: h, body: body}
}
