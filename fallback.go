package mitoken

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
)

// This file is the other issuers: azidentity's credentials, and the choice
// between IMDS and one of them on a host that may have no IMDS.

// ErrUnavailable reports that nothing answered: there is no metadata service, as
// on a developer's machine (see [Credential.Fallback]), or it is out of reach. It
// comes wrapped: use [errors.Is]. A first token is tried for up to a minute or so
// before that, unless the caller's context ends the wait.
var ErrUnavailable = errors.New("no metadata service answered")

// unavailableError is an ErrUnavailable with its circumstances.
type unavailableError struct {
	endpoint string
	reached  bool // somebody did accept a connection
	tries    int
	err      error  // of the last try
	hint     string // what to do about it
}

const offAzure = "; on a developer's machine, set Credential.Fallback, " +
	"for example to azidentity's AzureCLICredential"

func (e *unavailableError) Error() string {
	tries := "a try"
	if e.tries > 1 {
		tries = fmt.Sprintf("%d tries", e.tries)
	}
	return fmt.Sprintf("%v at %s in %s: %v%s", ErrUnavailable, e.endpoint, tries, e.err, e.hint)
}

func (e *unavailableError) Is(target error) bool { return target == ErrUnavailable }
func (e *unavailableError) Unwrap() error        { return e.err }

// delegate is the issuer that asks a credential of azidentity, or of any other
// maker.
type delegate struct {
	credential azcore.TokenCredential
}

// source is the credential's kind: "ClientSecretCredential", say.
func (d *delegate) source() string {
	kind := fmt.Sprintf("%T", d.credential)
	return kind[strings.LastIndex(kind, ".")+1:]
}

// issue asks the credential, which does its own retries. Those of azidentity
// keep a cache of their own, for all of the process, and refresh a token just
// before it expires. The one way past it is a demand for claims, so a renewal
// makes the one that says nothing but "a token of now", in the form that a
// service's own demand has (Microsoft: "Claims challenges, claims requests, and
// client capabilities").
//
// A credential that takes no claims, as that of the Azure CLI, is asked without.
// So is one that fails with them, but then only a newer token counts: the one in
// its cache would hide an outage.
func (d *delegate) issue(ctx context.Context, resource string, r round) (*token, error) {
	claims := r.claims
	if r.renew() && claims == "" && d.takesClaims() {
		claims = fmt.Sprintf(`{"access_token":{"nbf":{"essential":true,"value":"%d"}}}`,
			time.Now().Unix())
	}
	tok, err := d.ask(ctx, resource, claims)
	if err != nil && claims != r.claims {
		if plain, perr := d.ask(ctx, resource, ""); perr == nil && plain.expiry.After(r.held) {
			return plain, nil
		}
	}
	return tok, err
}

// takesClaims reports whether claims get past the credential's cache. Those that
// run a program to get a token refuse them.
func (d *delegate) takesClaims() bool {
	switch d.credential.(type) {
	case *azidentity.AzureCLICredential, *azidentity.AzureDeveloperCLICredential,
		*azidentity.AzurePowerShellCredential:
		return false
	}
	return true
}

// ask asks once.
func (d *delegate) ask(ctx context.Context, resource, claims string) (*token, error) {
	got, err := d.credential.GetToken(ctx, policy.TokenRequestOptions{
		Scopes: []string{resource + "/.default"}, Claims: claims,
	})
	if err != nil {
		return nil, d.refusal(err)
	}
	if err := checkToken(got.Token); err != nil {
		return nil, fmt.Errorf("%s: %w", d.source(), err)
	}
	return &token{value: got.Token, expiry: got.ExpiresOn.Round(0)}, nil
}

// refusal returns a credential's error in a line of its own. azidentity prints
// the whole response, which is many lines, and could hold a token if it was no
// refusal at all.
func (d *delegate) refusal(err error) error {
	failed, ok := errors.AsType[*azidentity.AuthenticationFailedError](err)
	if !ok || failed.RawResponse == nil {
		return fmt.Errorf("%s: %w", d.source(), &oneLine{err})
	}
	resp := failed.RawResponse
	if resp.StatusCode == http.StatusOK {
		return fmt.Errorf("%s: the answer was no usable token", d.source())
	}
	return fmt.Errorf("%s: the token endpoint answered %w", d.source(), readError(resp))
}

// oneLine is an error with its text on one line, and a short one.
type oneLine struct{ error }

func (e *oneLine) Error() string { return printable(e.error.Error(), maxDescription) }
func (e *oneLine) Unwrap() error { return e.error }

// A contact is the issuer of a host that may have no metadata service: it finds
// out at the first token. What it has found holds for good, since who a program
// is must never change while it runs.
type contact struct {
	imds     *imds
	fallback *delegate
	chosen   atomic.Pointer[issuer]
	turn     chan struct{} // held by the flight that is finding out
}

func newContact(m *imds, fallback azcore.TokenCredential) *contact {
	return &contact{imds: m, fallback: &delegate{fallback}, turn: make(chan struct{}, 1)}
}

func (c *contact) source() string {
	if i := c.chosen.Load(); i != nil {
		return (*i).source()
	}
	return c.imds.source()
}

func (c *contact) issue(ctx context.Context, resource string, r round) (*token, error) {
	if i := c.chosen.Load(); i != nil {
		return (*i).issue(ctx, resource, r)
	}
	select {
	case c.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	release := sync.OnceFunc(func() { <-c.turn })
	defer release()
	if i := c.chosen.Load(); i != nil {
		release()
		return (*i).issue(ctx, resource, r)
	}
	return c.first(ctx, resource, r, release)
}

// first gets the first token. Any answer by HTTP settles for IMDS, and nothing
// but a token for the fallback: while neither has given a sign, it is found out
// again the next time, so that a machine whose IMDS starts late is not taken
// for a laptop that is not logged in.
func (c *contact) first(
	ctx context.Context, resource string, r round, release func(),
) (*token, error) {
	tok, err := c.imds.reach(ctx, resource, r, func() {
		c.settle(c.imds)
		release() // the others know whom to ask now, and need not wait for this token
	})
	if c.chosen.Load() != nil {
		return tok, err
	}
	gone, ok := errors.AsType[*unavailableError](err)
	if !ok || gone.reached || ctx.Err() != nil {
		return nil, err
	}
	tok, ferr := c.fallback.issue(ctx, resource, r)
	if ferr != nil {
		gone.hint = ""
		return nil, fmt.Errorf("%w; nor did the fallback give a token: %w", err, ferr)
	}
	c.settle(c.fallback)
	return tok, nil
}

func (c *contact) settle(i issuer) { c.chosen.Store(&i) }
