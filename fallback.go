package mitoken

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
)

// This file is the choice between IMDS and a fallback, on a host that may have no
// IMDS.

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

// A contact is the issuer of a host that may have no metadata service: it finds
// out at the first token. What it has found holds for good, since who a program
// is must never change while it runs.
type contact struct {
	imds     *imds
	fallback *delegate
	chosen   atomic.Pointer[issuer]
	turn     chan struct{} // held by the flight that is finding out

	gone   *unavailableError // what the last of those has found; guarded by turn
	asking atomic.Int64      // flights that are asking the fallback for the first token since
}

func newContact(m *imds, fallback azcore.TokenCredential) *contact {
	return &contact{imds: m, fallback: &delegate{credential: fallback}, turn: make(chan struct{}, 1)}
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
	if c.asking.Load() == 0 {
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
		gone.hint = ""
		c.gone = gone
	}
	gone := c.gone
	c.asking.Add(1)
	defer c.asking.Add(-1)
	release() // the fallback may take its time: the others need not wait for this token, either
	tok, err := c.fallback.issue(ctx, resource, r)
	if err != nil {
		return nil, fmt.Errorf("%w; nor did the fallback give a token: %w", gone, err)
	}
	c.settle(c.fallback)
	return tok, nil
}

func (c *contact) settle(i issuer) { c.chosen.Store(&i) }
