package mitoken

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/hashicorp/go-retryablehttp"
)

// This file is one exchange with the instance metadata service (IMDS): who may
// be asked, the request, what is retried and when. What the answer must look
// like is in answer.go. The protocol is that of "How to use managed identities
// for Azure resources on an Azure VM to acquire an access token" (Microsoft).

const (
	imdsEndpoint   = "http://169.254.169.254"
	imdsTokenPath  = "/metadata/identity/oauth2/token"
	imdsAPIVersion = "2018-02-01"

	reachWithin = 2 * time.Second // to find out that nothing is there

	// IMDS gives out 410 while it is upgraded, for up to 70 seconds, and 429
	// while too many processes of the host ask at once, as they do when it has
	// just started. Both pass.
	busyFor    = 70 * time.Second
	maxRetries = 5 // of what may not pass
)

// retryWindows are what the wait before each retry is drawn from, from zero up:
// the delays that Microsoft's document suggests, as a full jitter. Without it,
// half of 110 processes that start together on one machine get no token.
var retryWindows = [...]time.Duration{2e9, 4e9, 8e9, 16e9, 30e9}

// imds is the issuer of this host's managed identity.
type imds struct {
	endpoint string // base URL
	selector string // the query parameter that selects an identity; empty for the default one
	id       string // its value
	base     http.RoundTripper
	limit    *limiter
}

// newIMDS returns the issuer for an identity, or what is wrong with the fields
// of the Credential it is made from.
func newIMDS(id azidentity.ManagedIDKind, endpoint string, base http.RoundTripper) (*imds, error) {
	m := &imds{endpoint: imdsEndpoint}
	var err error
	if m.selector, m.id, err = identitySelector(id); err != nil {
		return nil, fmt.Errorf("mitoken: Credential.ID: %w", err)
	}
	if endpoint != "" {
		if m.endpoint, err = checkEndpoint(endpoint); err != nil {
			return nil, fmt.Errorf("mitoken: Credential.Endpoint: %w", err)
		}
	}
	m.base, m.limit = base, newLimiter()
	if base == nil {
		m.base = hostTransport
	}
	if base == nil && m.endpoint == imdsEndpoint {
		m.limit = hostLimiter
	}
	return m, nil
}

// noRedirect keeps to the host that was asked: IMDS does not redirect, so whoever
// does is not IMDS.
func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

// identitySelector returns the query parameter that selects an identity.
func identitySelector(id azidentity.ManagedIDKind) (name, value string, err error) {
	switch id.(type) {
	case nil:
		return "", "", nil
	case azidentity.ClientID:
		name = "client_id"
	case azidentity.ObjectID:
		name = "object_id"
	case azidentity.ResourceID:
		name = "msi_res_id"
	default:
		return "", "", fmt.Errorf("the kind %T is not known", id)
	}
	value = id.String()
	if value == "" {
		return "", "", fmt.Errorf("the %T is empty; nil selects the host's default identity", id)
	}
	if err := checkPrintable(value); err != nil {
		return "", "", err
	}
	return name, value, nil
}

// checkEndpoint returns a base URL without its slash, if a token may come from
// there: over TLS, or without leaving the host and its link.
func checkEndpoint(endpoint string) (string, error) {
	u, err := url.Parse(endpoint)
	switch {
	case err != nil:
		return "", fmt.Errorf("%q is not a URL", endpoint)
	case u.Host == "" || u.User != nil || strings.Trim(u.Path, "/")+u.RawQuery+u.Fragment != "":
		return "", fmt.Errorf("%q is not of the form http://host:port", endpoint)
	case u.Scheme == "https", u.Scheme == "http" && isLocal(u.Hostname()):
		return u.Scheme + "://" + u.Host, nil
	}
	return "", fmt.Errorf("%q is neither https nor a loopback or link-local address", endpoint)
}

// isLocal reports whether a host is a loopback or link-local address.
func isLocal(host string) bool {
	addr, err := netip.ParseAddr(host)
	return isLoopback(host) || err == nil && addr.IsLinkLocalUnicast() && !addr.Is4In6()
}

// isLoopback reports whether a host is this one.
func isLoopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && addr.IsLoopback() && !addr.Is4In6()
}

func (m *imds) source() string { return "imds" }

// issue asks for a token once, or as often as a patient round allows. Claims
// mean nothing to IMDS.
func (m *imds) issue(ctx context.Context, resource string, r round) (*token, error) {
	return (&retries{imds: m, round: r}).do(ctx, resource)
}

// reach is issue while it is not known whether there is a metadata service. It
// gives up when none has been reached within reachWithin of the first try. A
// connection is enough: what is slow is there, and not to be given up for another
// identity. It calls answered when there is an answer, of whatever kind.
func (m *imds) reach(
	ctx context.Context, resource string, r round, answered func(),
) (*token, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	re := &retries{imds: m, round: r, seeking: true, answered: answered}
	var timer *time.Timer
	re.began = func() {
		if timer == nil {
			timer = time.AfterFunc(reachWithin, func() {
				if !re.reached.Load() {
					cancel()
				}
			})
		}
	}
	defer func() {
		if timer != nil {
			timer.Stop()
		}
	}()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { re.reached.Store(true) },
		ConnectDone: func(_, _ string, err error) { // GotConn waits for TLS
			if err == nil {
				re.reached.Store(true)
			}
		},
	})
	return re.do(ctx, resource)
}

// request returns the request for a token.
func (m *imds) request(ctx context.Context, resource string) (*retryablehttp.Request, error) {
	q := url.Values{"api-version": {imdsAPIVersion}, "resource": {resource}}
	if m.selector != "" {
		q.Set(m.selector, m.id)
	}
	target := m.endpoint + imdsTokenPath + "?" + q.Encode()
	req, err := retryablehttp.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Metadata", "true")
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "mitoken")
	return req, nil
}

// retries is one round of tries: what they brought, and whether and when there
// is another one.
type retries struct {
	*imds
	round
	seeking  bool          // it is not known whether anybody is there
	reached  atomic.Bool   // somebody is, after all
	began    func()        // is called when a try has had its turn, if not nil
	answered func()        // is called when there is an answer, if not nil
	tries    int           // so far
	busy     time.Time     // of the first 410 or 429
	delay    time.Duration // before the next try
	last     error         // of the last try that failed
}

// do makes the round.
func (re *retries) do(ctx context.Context, resource string) (*token, error) {
	req, err := re.request(ctx, resource)
	if err != nil {
		return nil, err
	}
	client := &retryablehttp.Client{
		HTTPClient: &http.Client{
			Transport:     &exchange{re.base, re.limit, re.began},
			CheckRedirect: noRedirect,
		},
		Logger:       nil,        // its own writes to stderr
		RetryMax:     1 << 30,    // check decides
		CheckRetry:   re.check,   // its own retries neither 404 nor 410
		Backoff:      re.backoff, // its own has no jitter, and lets Retry-After be a day
		ErrorHandler: retryablehttp.PassthroughErrorHandler,
	}
	resp, err := client.Do(req)
	switch {
	case err == nil && resp.StatusCode == http.StatusOK:
		return readToken(resp, resource, re.clientID())
	case re.last != nil:
		return nil, re.last
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return nil, re.unavailable(errors.New("other requests to it took all the time"))
	case re.seeking && !re.reached.Load():
		return nil, re.unavailable(fmt.Errorf("no connection within %v", reachWithin))
	}
	return nil, err // the context's
}

// unavailable is the error of a try, or a round, in which nothing answered.
func (re *retries) unavailable(err error) error {
	return &unavailableError{re.endpoint, re.reached.Load(), max(re.tries, 1), err, offAzure}
}

// check is the round's retryablehttp.CheckRetry.
func (re *retries) check(ctx context.Context, resp *http.Response, err error) (bool, error) {
	if ctx.Err() != nil {
		return false, ctx.Err() // of the round, not of the try
	}
	re.tries++
	var after time.Duration
	retry := true
	if err != nil {
		if u, ok := errors.AsType[*url.Error](err); ok {
			err = u.Err // the rest is what we know
		}
		re.last = re.unavailable(err)
	} else {
		re.reached.Store(true)
		if re.answered != nil {
			re.answered()
		}
		if resp.StatusCode == http.StatusOK {
			return false, nil
		}
		answer := readError(resp)
		after, retry = answer.retryAfter, retryable(resp.StatusCode)
		re.last = fmt.Errorf("the metadata service answered %w%s", answer, answer.hint())
	}
	re.failed(re.last)
	return retry && re.patient && re.again(ctx, resp, after), nil
}

// retryable reports whether IMDS may answer otherwise soon, by the table
// "Retry guidance" of Microsoft's document.
func retryable(status int) bool {
	switch status {
	case http.StatusNotFound, http.StatusGone, http.StatusTooManyRequests:
		return true
	}
	return status >= 500
}

// passes reports whether a refusal is one that IMDS takes back by itself.
func passes(status int) bool {
	return status == http.StatusGone || status == http.StatusTooManyRequests
}

// again reports whether there is to be another try, and draws the delay before
// it.
func (re *retries) again(ctx context.Context, resp *http.Response, after time.Duration) bool {
	now := time.Now()
	window := retryWindows[min(re.tries, len(retryWindows))-1]
	more := re.tries <= maxRetries
	switch {
	case resp != nil && passes(resp.StatusCode):
		if re.busy.IsZero() {
			re.busy = now
		}
		more = more || now.Sub(re.busy) < busyFor
	case re.seeking && !re.reached.Load():
		window, more = reachWithin/4, true // until reach has enough
	}
	// Retry-After may say a day. A caller is waiting: a half minute is enough.
	re.delay = max(rand.N(window), min(after, longGap))
	deadline, ok := ctx.Deadline()
	return more && (!ok || now.Add(re.delay).Before(deadline))
}

// backoff is the round's retryablehttp.Backoff.
func (re *retries) backoff(_, _ time.Duration, _ int, _ *http.Response) time.Duration {
	return re.delay
}

// clientID returns the client ID that was asked for, if it was one.
func (m *imds) clientID() string {
	if m.selector == "client_id" {
		return m.id
	}
	return ""
}
