package mitoken

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	azruntime "github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
)

// This file is the issuers that are credentials themselves: azidentity's, and
// those of other makers.

// delegate is the issuer that asks a credential of azidentity, or of any other
// maker.
type delegate struct {
	credential azcore.TokenCredential
	name       string // what it is called; empty: by its kind

	mu    sync.Mutex       // guards stuck
	stuck map[string]*call // by resource: those that went on after the end of their flights
}

// source is the credential's kind: "ClientSecretCredential", say.
func (d *delegate) source() string {
	if d.name != "" {
		return d.name
	}
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

// takesClaims reports whether claims get past the credential's cache, and do no
// harm. Those that run a program to get a token refuse them, and to those that
// ask a person they are a reason to do so.
func (d *delegate) takesClaims() bool {
	switch d.credential.(type) {
	case *azidentity.AzureCLICredential, *azidentity.AzureDeveloperCLICredential,
		*azidentity.AzurePowerShellCredential,
		*azidentity.InteractiveBrowserCredential, *azidentity.DeviceCodeCredential:
		return false
	}
	return true
}

// ask asks once.
func (d *delegate) ask(ctx context.Context, resource, claims string) (*token, error) {
	got, err := d.call(ctx, policy.TokenRequestOptions{
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
	if body, err := azruntime.Payload(resp); err == nil { // MSAL has read it to the end
		resp.Body = io.NopCloser(bytes.NewReader(body))
	}
	return fmt.Errorf("%s: the token endpoint answered %w", d.source(), readError(resp))
}

// oneLine is an error with its text on one line, and a short one.
type oneLine struct{ error }

func (e *oneLine) Error() string { return printable(e.error.Error(), maxDescription) }
func (e *oneLine) Unwrap() error { return e.error }

// patience is how long a credential may go on after the end of its context.
const patience = time.Second

// A call is one of a credential's GetToken, in a goroutine of its own.
type call struct {
	done chan struct{} // closed when it is over

	// What came of it, set before done is closed.
	token    azcore.AccessToken
	err      error
	panicked *relayed
}

// relayed is a panic that goes on in another goroutine, with the stack that it had
// in its own.
type relayed struct {
	value any
	stack []byte
}

// call asks the credential, and leaves it to itself if it goes on when ctx is
// done: some wait for minutes, whatever their context says, and nothing of ours
// may wait with them. While one does, no other call is made for the resource.
func (d *delegate) call(ctx context.Context, opts policy.TokenRequestOptions) (azcore.AccessToken, error) {
	resource := opts.Scopes[0]
	for {
		d.mu.Lock()
		c, old := d.stuck[resource]
		if !old {
			c = d.start(ctx, opts)
		}
		d.mu.Unlock()
		if !c.wait(ctx) {
			d.mu.Lock()
			defer d.mu.Unlock()
			if d.stuck == nil {
				d.stuck = map[string]*call{}
			}
			d.stuck[resource] = c
			return azcore.AccessToken{}, ctx.Err()
		}
		d.mu.Lock()
		delete(d.stuck, resource)
		d.mu.Unlock()
		if old && (c.err != nil || c.panicked != nil || opts.Claims != "") {
			continue // it was asked for something else, or long ago
		}
		if c.panicked != nil {
			panic(c.panicked)
		}
		return c.token, c.err
	}
}

// start makes a call.
func (d *delegate) start(ctx context.Context, opts policy.TokenRequestOptions) *call {
	c := &call{done: make(chan struct{}), err: errors.New("the credential ended its goroutine")}
	go func() {
		defer close(c.done)
		defer func() {
			if p := recover(); p != nil {
				c.panicked = &relayed{p, debug.Stack()}
			}
		}()
		c.token, c.err = d.credential.GetToken(ctx, opts)
	}()
	return c
}

// wait waits for the end of a call, or a little longer than ctx.
func (c *call) wait(ctx context.Context) (over bool) {
	select {
	case <-c.done:
		return true
	case <-ctx.Done():
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-c.done:
		return true
	case <-timer.C:
		return false
	}
}
