// Provision assigns an app role of a service to a managed identity: the article's
// third step. The first two, the registration of the service with its roles and its
// service principal, are in register.sh, which does the third one as well, with the
// Azure CLI in place of this program.
//
//	go run ./examples/provision -resource https://myapp.aztoso.com -role consumer -identity OBJECT-ID
//
// It may be run again: what is assigned stays so. Whoever runs it needs two
// permissions of Microsoft Graph, which an error names. Its token for Graph is that
// of this host's managed identity or, elsewhere, of who is logged in to the Azure
// CLI.
//
// To see the whole way on one machine, without Azure:
//
//	go run ./examples/provision -demo
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/aztoso/mitoken"
)

const graph = "https://graph.microsoft.com"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout)
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "provision:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out io.Writer) error {
	flags := flag.NewFlagSet("provision", flag.ContinueOnError)
	flags.SetOutput(out)
	resource := flags.String("resource", "https://myapp.aztoso.com", "App ID `URI` of the service")
	role := flags.String("role", "consumer", "`value` of its app role")
	identity := flags.String("identity", "", "the managed identity: its object `ID`, client ID or name")
	show := flags.Bool("demo", false, "show the whole way against a tenant of its own")
	if err := flags.Parse(args); err != nil {
		return err
	}
	switch {
	case flags.NArg() > 0:
		return fmt.Errorf("there is an argument too many: %q", flags.Arg(0))
	case *show:
		return demo(ctx, out)
	case *identity == "":
		return errors.New("-identity is missing: to whom is the role to be assigned?")
	}
	cli, err := azidentity.NewAzureCLICredential(nil)
	if err != nil {
		return err
	}
	cred := &mitoken.Credential{Fallback: cli}
	defer cred.Close()
	d := newDirectory(cred, nil)
	defer d.client.CloseIdleConnections()
	return d.provision(ctx, out, *resource, *role, *identity)
}

// newDirectory returns Microsoft Graph for an identity. base is how it is reached;
// nil, as ever.
func newDirectory(cred *mitoken.Credential, base http.RoundTripper) *directory {
	return &directory{
		base: graph,
		client: &http.Client{
			Transport: &mitoken.Transport{Source: cred.TokenSource(graph), Base: base},
			Timeout:   time.Minute,
		},
	}
}

// provision finds the service, its role and the identity, and assigns the one to
// the other.
func (d *directory) provision(ctx context.Context, out io.Writer, resource, value, name string) error {
	service, err := d.service(ctx, strings.TrimSuffix(resource, "/"))
	if err != nil {
		return err
	}
	r, err := service.role(value)
	if err != nil {
		return err
	}
	identity, err := d.identity(ctx, name)
	if err != nil {
		return err
	}
	isNew, err := d.assign(ctx, identity, service, r)
	switch {
	case err != nil:
		return err
	case isNew:
		fmt.Fprintf(out, "%s (%s) has the app role %s of %s now: it is in the next token, which may be "+
			"up to 24 hours away\n", identity.DisplayName, identity.ID, value, service.DisplayName)
	default:
		fmt.Fprintf(out, "%s (%s) has the app role %s of %s already\n", identity.DisplayName, identity.ID, value, service.DisplayName)
	}
	return nil
}
