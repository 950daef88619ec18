// Token prints an access token for this host's managed identity. It does what
// this line does, which the article "OAuth 2.0 with Managed Identities" gives:
//
//	curl -s -H Metadata:true --get http://169.254.169.254/metadata/identity/oauth2/token \
//		-d api-version=2018-02-01 --data-urlencode resource=https://myapp.aztoso.com |
//		jq -r .access_token
//
// but tries again where the metadata service asks for it, checks the answer, and
// says what is wrong in one line. With -claims it prints what is in the token,
// for people to read, in place of the token.
//
//	token -resource https://myapp.aztoso.com
//	token -resource https://myapp.aztoso.com -claims
//	curl -H "Authorization: Bearer $(token -resource https://myapp.aztoso.com)" ...
//
// The token is a secret: whoever sees it is that identity until it expires.
//
// The exit code is 0 with a token, 1 without one, and 2 after a mistake in the
// flags.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"

	"github.com/aztoso/mitoken"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run is the program. It returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parse(args, stdout)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintf(stderr, "token: %v (see token -h)\n", err)
		return 2
	}
	text, err := o.text(ctx)
	if err == nil {
		_, err = fmt.Fprintln(stdout, text)
	}
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 1
	}
	return 0
}

// options are what the flags say.
type options struct {
	resource string
	id       azidentity.ManagedIDKind // nil: the host's default identity
	endpoint string
	timeout  time.Duration
	claims   bool
}

// parse reads the flags. It prints their usage to help if they ask for it.
func parse(args []string, help io.Writer) (*options, error) {
	var o options
	var client, object, resource string
	f := flag.NewFlagSet("token", flag.ContinueOnError)
	f.StringVar(&o.resource, "resource", "", "App ID URI of the service that the token is for")
	f.StringVar(&client, "client-id", "", "user-assigned identity to be, by its client ID")
	f.StringVar(&object, "object-id", "", "user-assigned identity to be, by its object ID")
	f.StringVar(&resource, "resource-id", "", "user-assigned identity to be, by its resource ID")
	f.StringVar(&o.endpoint, "endpoint", "", "base URL of the metadata service, if not IMDS's")
	f.DurationVar(&o.timeout, "timeout", 30*time.Second, "how long to try")
	f.BoolVar(&o.claims, "claims", false, "print the claims of the token in place of the token")
	f.SetOutput(io.Discard) // its errors are followed by all of the usage: one line is enough
	f.Usage = func() {}
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			f.SetOutput(help)
			fmt.Fprintln(help, "Usage: token -resource URI [flags]")
			f.PrintDefaults()
		}
		return nil, err
	}
	ids := 0
	f.Visit(func(set *flag.Flag) {
		switch set.Name {
		case "client-id":
			o.id, ids = azidentity.ClientID(client), ids+1
		case "object-id":
			o.id, ids = azidentity.ObjectID(object), ids+1
		case "resource-id":
			o.id, ids = azidentity.ResourceID(resource), ids+1
		}
	})
	switch {
	case f.NArg() > 0:
		return nil, fmt.Errorf("unexpected argument %q", f.Arg(0))
	case o.resource == "":
		return nil, errors.New("-resource is missing: the App ID URI of the service to call")
	case ids > 1:
		return nil, errors.New("only one of -client-id, -object-id and -resource-id selects an identity")
	case o.timeout <= 0:
		return nil, fmt.Errorf("-timeout is %v: there is no time to try", o.timeout)
	}
	return &o, nil
}

// text returns what to print: the token or its claims.
func (o *options) text(ctx context.Context) (string, error) {
	gaveUp := fmt.Errorf("gave up after %v", o.timeout)
	ctx, cancel := context.WithTimeoutCause(ctx, o.timeout, gaveUp)
	defer cancel()
	cred := mitoken.Credential{ID: o.id, Endpoint: o.endpoint}
	defer cred.Close()

	tok, err := cred.TokenSource(o.resource).TokenContext(ctx)
	if err != nil {
		return "", err
	}
	if !o.claims {
		return tok.AccessToken, nil
	}
	claims, err := decodeClaims(tok.AccessToken)
	if err != nil {
		return "", err
	}
	text, err := json.MarshalIndent(claims, "", "  ")
	return string(text), err
}
