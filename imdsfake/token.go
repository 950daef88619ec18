package imdsfake

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// This file is how a request for a token is answered, whatever kind of host it is
// sent to.

// parameters are those of a request, in its query or in a form.
type parameters struct {
	url.Values
	bad bool // they cannot be read
}

// formLimit is how many bytes of a form are read.
const formLimit = 1 << 16

func readParameters(c *call) parameters {
	text := c.URL.RawQuery
	if c.protocol.method == http.MethodPost {
		if c.Body == nil {
			return parameters{}
		}
		form, err := io.ReadAll(io.LimitReader(c.Body, formLimit))
		if err != nil || text != "" {
			return parameters{bad: true}
		}
		text = string(form)
	}
	values, err := url.ParseQuery(text)
	return parameters{values, err != nil}
}

func (p parameters) has(name string) bool   { return p.Values.Has(name) }
func (p parameters) get(name string) string { return p.Values.Get(name) }

// repeated returns a parameter that is there more than once, if one is.
func (p parameters) repeated() string {
	for name, values := range p.Values {
		if len(values) > 1 {
			return name
		}
	}
	return ""
}

// token answers a request for a token.
func (h *Handler) token(c *call) answer {
	tok, id, p := h.issueOrRefuse(c)
	if p != nil {
		return refusal(c, p)
	}
	c.entry.ClientID = id.ClientID
	return jsonAnswer(http.StatusOK, c.protocol.write(c, tok, id))
}

func (h *Handler) issueOrRefuse(c *call) (issuedToken, Identity, *problem) {
	id, p := h.identify(c)
	if p != nil {
		return issuedToken{}, Identity{}, p
	}
	app, p := h.appFor(id, c.entry.Resource)
	if p != nil {
		return issuedToken{}, Identity{}, p
	}
	return h.issue(c, id, app), id, nil
}

// identify returns whom a request is from, or what is wrong with it.
func (h *Handler) identify(c *call) (Identity, *problem) {
	p := c.protocol.checkMethod(c)
	if p == nil && c.protocol.authenticate != nil {
		return c.protocol.authenticate(h, c)
	}
	if p == nil {
		p = c.protocol.check(h, c)
	}
	if p == nil {
		p = c.protocol.checkParameters(c.query)
	}
	if p != nil {
		return Identity{}, p
	}
	id, text := h.tenant.identity(c.selector, c.query.get(c.selector))
	if text != "" {
		return id, &problem{status: 400, code: "invalid_request", text: text, kind: noIdentity}
	}
	return id, nil
}

func (p *protocol) checkMethod(c *call) *problem {
	if c.Method == p.method {
		return nil
	}
	return &problem{status: http.StatusMethodNotAllowed, code: "method_not_allowed",
		text: "Only " + p.method + " is supported", header: http.Header{"Allow": {p.method}}}
}

// checkParameters returns what is wrong with the parameters, as far as that can
// be said without the tenant. One that the host does not know is refused, which
// real hosts do not do: it is a spelling mistake, which makes somebody else of a
// client.
func (p *protocol) checkParameters(q parameters) *problem {
	if q.bad {
		return invalid("The parameters are malformed")
	}
	if name := q.repeated(); name != "" {
		return invalid("The parameter %q is given more than once", name)
	}
	var chosen []string
	for name, values := range q.Values {
		switch {
		case slices.Contains(p.selectors, name):
			if values[0] != "" || !p.emptyIsNone {
				chosen = append(chosen, name)
			}
		case slices.Contains(p.options, name):
		case name != "resource" && (name != "api-version" || p.versions == nil):
			return invalid("The parameter %q is not known", name)
		}
	}
	switch {
	case len(chosen) > 1:
		slices.Sort(chosen)
		return invalid("Only one of %s selects an identity", strings.Join(chosen, ", "))
	case len(chosen) == 1 && q.get(chosen[0]) == "":
		return invalid("The parameter %q is empty", chosen[0])
	case q.get("resource") == "":
		return &problem{status: 400, code: "invalid_request", kind: noResource,
			text: "The required parameter \"resource\" is missing"}
	}
	return p.checkVersion(q)
}

func (p *protocol) checkVersion(q parameters) *problem {
	switch version := q.get("api-version"); {
	case p.versions == nil || slices.Contains(p.versions, version):
		return nil
	case version == "":
		return &problem{status: 400, code: "invalid_request", kind: badVersion, text: "The required parameter \"api-version\" is missing. " +
			"Newest supported version: " + p.versions[len(p.versions)-1]}
	default:
		return &problem{status: 400, code: "invalid_request", kind: badVersion, text: fmt.Sprintf("The api-version '%s' is not supported. "+
			"Supported version is '%s'.", version, strings.Join(p.versions, "', '"))}
	}
}

func invalid(format string, args ...any) *problem {
	return &problem{status: http.StatusBadRequest, code: "invalid_request", text: fmt.Sprintf(format, args...)}
}

// appFor returns the app that a resource names, if Entra issues tokens for it to
// an identity.
func (h *Handler) appFor(id Identity, resource string) (*App, *problem) {
	app, ok := h.tenant.app(resource)
	if !ok {
		return nil, &problem{status: 400, code: "invalid_resource", kind: unknownResource, text: fmt.Sprintf("AADSTS500011: The resource "+
			"principal named %s was not found in the tenant named %s. This can happen if the application has not "+
			"been installed by the administrator of the tenant or consented to by any user in the tenant. You might "+
			"have sent your authentication request to the wrong tenant.", resource, h.tenant.id)}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if app.AssignmentRequired && !h.tenant.assigned(id, app) {
		return nil, &problem{status: 400, code: "invalid_grant", text: fmt.Sprintf("AADSTS501051: Application "+
			"'%s'(%s) is not assigned to a role for the application '%s'(%s).",
			id.ClientID, id.Name, resource, app.name())}
	}
	return app, nil
}

// issuedToken is a token that was issued. Like Entra's, its times are whole
// seconds.
type issuedToken struct {
	value          string
	issued, expiry time.Time
}

// issue returns a token, which is a new one unless the cache has one that it
// gives out again.
func (h *Handler) issue(c *call, id Identity, app *App) issuedToken {
	now := time.Now()
	h.mu.Lock()
	key := cacheKey{id.ObjectID, c.entry.Resource}
	k := h.cache[key]
	if k == nil {
		k = new(cached)
		h.cache[key] = k
	}
	cache := h.Cache
	if c.protocol == entra {
		cache = NoCache // which is IMDS's
	}
	slot, again := k.next(cache, now)
	again = again && !slot.isRefused(c)
	before, roles := *slot, h.tenant.rolesOf(id, app)
	h.mu.Unlock()
	if again {
		c.entry.Reason = "the token of " + now.Sub(before.issued).Truncate(time.Second).String() + " ago"
		return before
	}
	c.entry.Reason = "a new token"
	if cache == AgedFirst && before.value == "" {
		now = now.Add(-h.lifetimeFor(c, app) / 24 * 23)
		c.entry.Reason = "an aged token"
	}
	tok, claims := h.sign(c, id, app, roles, now) // a millisecond, for which nobody else waits
	h.mu.Lock()
	defer h.mu.Unlock()
	if cache.shares() && *slot != before {
		c.entry.Reason = "the token of a request at the same time"
		return *slot
	}
	*slot = tok
	h.tokens = append(h.tokens, Token{c.entry.Resource, id.ClientID, tok.issued, tok.expiry, claims})
	if len(h.tokens) >= 2*tokensKept {
		h.tokens = slices.Clone(h.tokens[tokensKept:])
	}
	return tok
}

func (h *Handler) lifetimeFor(c *call, app *App) time.Duration {
	usual := 24 * time.Hour
	if c.protocol == entra {
		usual = time.Hour
	}
	return cmp.Or(app.Lifetime, h.Lifetime, usual).Truncate(time.Second)
}

// refused is the parameter by which clients of some hosts name a token that a
// service has refused, to get another one: its SHA-256, in hexadecimal.
const refused = "token_sha256_to_refresh"

// isRefused tells whether a request names this token so.
func (tok issuedToken) isRefused(c *call) bool {
	if !c.query.has(refused) {
		return false
	}
	sum := sha256.Sum256([]byte(tok.value))
	return strings.EqualFold(c.query.get(refused), hex.EncodeToString(sum[:]))
}
