// Imdsfake serves a fake Azure instance metadata service, to run programs that
// use managed identities against, in any language:
//
//	go run ./imdsfake/cmd/imdsfake
//
// Its tenant has an identity of the host, "host", another one, "daemon", and an
// app that declares the roles of a manifest. The host has all of them, the daemon
// none.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/aztoso/mitoken/imdsfake"
)

// consumer is the manifest of an app that is given none.
const consumer = `[{
	"allowedMemberTypes": ["Application"],
	"description": "Consumers can use the service",
	"displayName": "Consumer",
	"isEnabled": true,
	"value": "consumer"
}]`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout)
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "imdsfake:", err)
		os.Exit(1)
	}
}

// run serves until ctx is done.
func run(ctx context.Context, args []string, out io.Writer) error {
	flags := flag.NewFlagSet("imdsfake", flag.ContinueOnError)
	flags.SetOutput(out)
	addr := flags.String("addr", "127.0.0.1:8169",
		"`address` to listen on; whoever reaches it gets tokens of the fake")
	app := flags.String("app", "https://myapp.aztoso.com", "App ID `URI` of the service")
	manifest := flags.String("manifest", "",
		"`file` with the app roles of the service, as az ad app create --app-roles takes it")
	lifetime := flags.Duration("lifetime", 24*time.Hour, "`duration` that tokens live")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("there is an argument too many: %q", flags.Arg(0))
	}
	if *lifetime < time.Second {
		return fmt.Errorf("-lifetime %v is less than a second", *lifetime)
	}
	fake, err := newTenant(*app, *manifest)
	if err != nil {
		return err
	}
	fake.Lifetime = *lifetime
	listener, err := net.Listen("tcp", *addr)
	if err != nil {
		return fmt.Errorf("-addr: %w", err)
	}
	describe(out, "http://"+listener.Addr().String(), fake)
	server := &http.Server{Handler: fake, ReadHeaderTimeout: 10 * time.Second}
	end := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer end()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// newTenant returns a fake with an app that declares the roles of a manifest.
func newTenant(app, manifest string) (*imdsfake.Handler, error) {
	data := []byte(consumer)
	if manifest != "" {
		var err error
		if data, err = os.ReadFile(manifest); err != nil {
			return nil, fmt.Errorf("-manifest: %w", err)
		}
	}
	roles, err := imdsfake.ParseManifest(data)
	if err != nil {
		return nil, fmt.Errorf("-manifest: %w", err)
	}
	fake := &imdsfake.Handler{
		Identities: []imdsfake.Identity{
			{Name: "host", SystemAssigned: true},
			{Name: "daemon", ClientID: "da000000-0000-4000-8000-000000000001"},
		},
		Apps: []imdsfake.App{{URI: app, Roles: roles}},
	}
	for _, r := range roles {
		fake.Assignments = append(fake.Assignments,
			imdsfake.Assignment{Identity: "host", Resource: app, Role: r.Value})
	}
	return fake, nil
}

// describe tells what is served, and how to try it.
func describe(out io.Writer, base string, fake *imdsfake.Handler) {
	app := fake.Apps[0]
	fmt.Fprintf(out, "A fake instance metadata service at %s\n\n", base)
	fmt.Fprintf(out, "  tenant      %s\n", imdsfake.DefaultTenant)
	fmt.Fprintf(out, "  issuer      %s\n", fake.Issuer())
	fmt.Fprintf(out, "  keys        %s/%s/discovery/keys\n", base, imdsfake.DefaultTenant)
	fmt.Fprintf(out, "  resource    %s\n", app.URI)
	for _, r := range app.Roles {
		fmt.Fprintf(out, "  app role    %s, which the host has and the daemon has not\n", r.Value)
	}
	fmt.Fprintf(out, "  identities  the host's, and the daemon's with client_id=%s\n\n",
		fake.Identities[1].ClientID)
	fmt.Fprintf(out, "curl -s -H Metadata:true '%s/metadata/identity/oauth2/token"+
		"?api-version=2018-02-01&resource=%s'\n", base, url.QueryEscape(app.URI))
}
