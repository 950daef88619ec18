// Package mitoken gives a program on Azure access tokens for its managed
// identity, keeps them fresh through outages, and attaches them to the requests
// that need them.
//
// The zero [Credential] is the identity of the host that the program runs on. To
// call a service as that identity, put a [Transport] under an [http.Client]:
//
//	var cred mitoken.Credential
//	defer cred.Close()
//
//	client := &http.Client{Transport: &mitoken.Transport{
//		Source: cred.TokenSource("https://myapp.aztoso.com"),
//	}}
//	resp, err := client.Get("https://myapp.aztoso.com/orders")
//
// The service is at its own App ID URI here. One at another address is listed in
// the Transport's Origins. A [TokenSource] is an [oauth2.TokenSource] too, and a Credential an
// [azcore.TokenCredential], for any client of the Azure SDK.
//
// # Refresh
//
// A token is refreshed in the background when 40 to 50 % of its lifetime is
// over, whether or not anybody uses it. From then on a failure is retried, ever
// less often, and no caller sees it: as long as the token in hand is valid, a
// caller gets it at once. So while the metadata service answers, and gives out a
// newer token once the current one is past half its life, there is always a
// token with at least half its lifetime left. An outage of up to 12 hours, for
// the usual token of 24, costs no caller an error or a wait; one that begins
// just after a refresh, up to 24.
//
// It cannot help a program that starts during the outage. And a token cannot be
// taken back once it is issued: an app role that is granted or revoked shows only
// in the next one.
//
// # Errors
//
// A [*ResponseError] is a refusal: whoever issues tokens answered, with none.
// [ErrUnavailable] means that nothing answered, [ErrClosed] that the Credential
// was closed, and an [*OriginError] that a request was going where no token may
// go. They come wrapped: use [errors.Is] and [errors.As]. A mistake in a field of
// a Credential or a Transport is the error of the first token, and names the
// field.
//
// No error, log record, [Event] or [Status] holds a token.
package mitoken

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"golang.org/x/oauth2"
)

// ErrClosed reports that a token was asked for after [Credential.Close]. It comes
// wrapped: use [errors.Is].
var ErrClosed = errors.New("the credential is closed")

// A Credential is an identity, with a cache of its tokens.
//
// The zero value is ready to use: it is the managed identity of the host. What
// kind of host that is, the first token finds out from the environment, for good:
// App Service, Functions and Container Apps, Azure ML, Cloud Shell, Azure Arc and
// Service Fabric as azidentity does, then a workload identity of AKS, and a virtual
// machine otherwise. A Credential asks nobody for anything before that. It must not be
// copied, nor its fields be changed, after its first use. Its methods are safe
// for concurrent use.
//
// One Credential serves a whole program: every client and every resource shares
// its cache, and the metadata service, which answers a machine only so often,
// is asked once for all.
type Credential struct {
	// ID is the user-assigned identity to be: an [azidentity.ClientID],
	// [azidentity.ObjectID] or [azidentity.ResourceID]. If nil, the host's
	// default identity is used: the system-assigned one or, where there is none,
	// the only one that is assigned.
	ID azidentity.ManagedIDKind

	// Upstream is asked for all tokens, in place of this host, if it is not nil: a
	// service principal with a secret or a certificate, for example. Its tokens are
	// kept and refreshed like others, as far as it lets go of those in a cache of
	// its own: see [Status].Repeats.
	Upstream azcore.TokenCredential

	// Fallback is asked if the host turns out to have no metadata service, as a
	// developer's machine: if nothing there accepts a connection within 2 s of
	// the first request for a token. From its first token on it is asked for all
	// of them; where the metadata service has answered once, it never is. If
	// nil, such a host has no tokens, only [ErrUnavailable]. It is ignored if
	// Upstream is set, and on hosts whose environment says what they are.
	Fallback azcore.TokenCredential

	// Endpoint is the base URL of the metadata service. It must be https, or
	// http at a loopback or link-local address. If empty,
	// "http://169.254.169.254" is used. If it is set, the host is taken for a
	// virtual machine, whatever its environment says.
	Endpoint string

	// IMDSTransport makes the requests to the metadata service. If nil, one is
	// used that takes no proxy, as the service demands, and keeps no connection.
	// If it is set, the host is taken for a virtual machine, as with Endpoint.
	IMDSTransport http.RoundTripper

	// Logger gets a record when the first token is issued, when attempts begin
	// to fail, and when they succeed again. If nil, nothing is logged.
	Logger *slog.Logger

	// Observe, if not nil, is called once for each attempt to get a token, after
	// those who wait for the token have got it. It must be safe for concurrent
	// use.
	Observe func(Event)

	clock     clock              // nil: systemClock
	transport policy.Transporter // of azidentity, on hosts that have no IMDS; nil but in tests
	once      sync.Once
	cache     *cache // set by once
	err       error  // of the fields; set by once
}

var _ azcore.TokenCredential = (*Credential)(nil)

// TokenSource returns the source of tokens for a resource: the App ID URI of the
// service to call, such as "https://myapp.aztoso.com", or its client ID. It is
// not a scope: "/.default" does not belong to it.
//
// It does no I/O. All sources for a resource share one token.
func (c *Credential) TokenSource(resource string) *TokenSource {
	e, err := c.entry(resource)
	return &TokenSource{entry: e, err: err}
}

// GetToken implements [azcore.TokenCredential], for clients of the Azure SDK. It
// is [TokenSource.TokenContext] for the resource of the one scope in opts.
//
// Claims, which a service demands if it has had enough of a token, get a caller
// past the cache once. A TenantID must be that of the identity, which has tokens
// of no other: clients such as Key Vault's name it each time. Any other one is an
// error.
func (c *Credential) GetToken(
	ctx context.Context, opts policy.TokenRequestOptions,
) (azcore.AccessToken, error) {
	h, err := c.held(ctx, opts)
	if err == nil && opts.TenantID != "" {
		err = checkTenant(h.oauth2.AccessToken, opts.TenantID)
	}
	if err != nil {
		return azcore.AccessToken{}, err
	}
	return azcore.AccessToken{
		Token: h.oauth2.AccessToken, ExpiresOn: h.expiry, RefreshOn: h.refreshOn,
	}, nil
}

// held returns what the cache holds for a request of the Azure SDK.
func (c *Credential) held(ctx context.Context, opts policy.TokenRequestOptions) (*held, error) {
	if len(opts.Scopes) != 1 {
		return nil, fmt.Errorf("mitoken: a token has one scope, not %d", len(opts.Scopes))
	}
	e, err := c.scoped(opts.Scopes[0])
	if err != nil {
		return nil, err
	}
	if opts.Claims != "" {
		return e.renew(ctx, opts.Claims)
	}
	return e.get(ctx)
}

// Close ends all refreshes, and waits until requests that were under way have
// been given up. After that there is no goroutine and no timer left, and no
// token to be had: only [ErrClosed]. It does not wait for Observe, nor for an
// Upstream or a Fallback that goes on when its context is done. The error is
// always nil. Closing again does nothing.
func (c *Credential) Close() error {
	c.once.Do(c.init)
	c.cache.close()
	return nil
}

// scoped is entry for the resource of a scope. Most programs have but one, and
// need not look it up.
func (c *Credential) scoped(scope string) (*entry, error) {
	c.once.Do(c.init)
	if e := c.cache.first.Load(); e != nil && e.scope == scope {
		return e, nil
	}
	return c.entry(strings.TrimSuffix(scope, "/.default"))
}

// entry returns the cache's entry for a resource, or what is wrong with it or
// with the fields of the Credential.
func (c *Credential) entry(resource string) (*entry, error) {
	c.once.Do(c.init)
	if e := c.cache.lookup(resource); e != nil {
		return e, nil
	}
	if c.err != nil {
		return nil, c.err
	}
	if err := checkResource(resource); err != nil {
		return nil, err
	}
	return c.cache.add(resource), nil
}

// init makes the cache and its issuer.
func (c *Credential) init() {
	if c.clock == nil {
		c.clock = systemClock{}
	}
	var issuer issuer
	issuer, c.err = c.issuer()
	c.cache = newCache(issuer, c.clock, c.Logger, c.Observe)
}

// issuer returns whom the fields say to ask.
func (c *Credential) issuer() (issuer, error) {
	if c.Upstream != nil {
		if c.ID != nil {
			return nil, errors.New("mitoken: Credential.ID selects a managed identity, " +
				"which Credential.Upstream is asked in place of: set one of them")
		}
		return &delegate{credential: c.Upstream}, nil
	}
	m, err := newIMDS(c.ID, c.Endpoint, c.IMDSTransport)
	if err != nil {
		return nil, err
	}
	var imds issuer = m
	if c.Fallback != nil {
		imds = newContact(m, c.Fallback)
	}
	if c.Endpoint != "" || c.IMDSTransport != nil {
		return imds, nil
	}
	return &host{id: c.ID, imds: imds, transport: c.transport}, nil
}

// checkTenant returns what is wrong with a token for a client that wants one of a
// tenant. Of a token that nobody can read, all that can be said is nothing.
func checkTenant(token, tenant string) error {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil
	}
	var claims struct {
		TID string `json:"tid"`
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || json.Unmarshal(payload, &claims) != nil || claims.TID == "" ||
		strings.EqualFold(claims.TID, tenant) {
		return nil
	}
	return fmt.Errorf("mitoken: a token of the tenant %q was asked for, and the identity is of the "+
		"tenant %q: it has none of others", tenant, claims.TID)
}

// checkResource returns what is wrong with a resource.
func checkResource(resource string) error {
	if resource == "" {
		return errors.New("mitoken: the resource is empty: " +
			"it is the App ID URI of the service to call")
	}
	if err := checkPrintable(resource); err != nil {
		return fmt.Errorf("mitoken: the resource %w", err)
	}
	if base, ok := strings.CutSuffix(resource, "/.default"); ok {
		return fmt.Errorf("mitoken: %q is a scope; its resource is %q", resource, base)
	}
	return nil
}

// A TokenSource is a source of tokens for one resource. [Credential.TokenSource]
// makes one. Its methods are safe for concurrent use.
//
// It is an [oauth2.TokenSource], but must not be given to [oauth2.NewClient] or
// [oauth2.ReuseTokenSource]: they hold on to a token until 10 s before it
// expires, and an outage at that time is all it takes. [Transport] and
// [oauth2.Transport] ask anew for each request, which costs nothing.
type TokenSource struct {
	entry *entry // nil if err is not
	err   error
}

var _ oauth2.TokenSource = (*TokenSource)(nil)

// Token is [TokenSource.TokenContext] with a context that never ends.
func (s *TokenSource) Token() (*oauth2.Token, error) {
	return s.TokenContext(context.Background())
}

// TokenContext returns a token that is valid now. It returns at once while there
// is one, which is always but for the first time and for outages longer than a
// token. Only where there is none does it wait, until ctx is done or, at the
// latest, for two minutes: for one request that all callers share, and that
// goes on if they leave.
//
// Between requests that fail it returns the last error at once. The error may be
// a [*ResponseError], [ErrUnavailable], [ErrClosed] or the context's.
//
// The token is shared: it must not be modified. Formatting it with package fmt
// prints the secret.
func (s *TokenSource) TokenContext(ctx context.Context) (*oauth2.Token, error) {
	h, err := s.held(ctx)
	if err != nil {
		return nil, err
	}
	return h.oauth2, nil
}

// Status returns the state of the source. It does not block. After a mistake in
// the fields of the Credential, or in the resource, all there is is LastError.
func (s *TokenSource) Status() Status {
	if s.entry == nil {
		return Status{State: "empty", LastError: s.misuse().Error()}
	}
	return s.entry.status()
}

// held returns what the cache holds for the source.
func (s *TokenSource) held(ctx context.Context) (*held, error) {
	if s.entry == nil {
		return nil, s.misuse()
	}
	return s.entry.get(ctx)
}

// misuse returns why a source cannot have a token.
func (s *TokenSource) misuse() error {
	if s.err != nil {
		return s.err
	}
	return errors.New("mitoken: a TokenSource is made by Credential.TokenSource")
}
