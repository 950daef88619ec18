// Protectedservice is a service that takes tokens of Microsoft Entra: what the
// article's last part asks of it. What checks them is package guard, which can be
// copied.
//
// Without a tenant, it brings one of its own, with a metadata service to get tokens
// from, and says what to try with curl:
//
//	go run ./examples/protectedservice
//
// With one, it serves callers of that:
//
//	go run ./examples/protectedservice -tenant TENANT -audience https://myapp.aztoso.com,CLIENT_ID
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/aztoso/mitoken/examples/protectedservice/guard"
	"github.com/aztoso/mitoken/imdsfake"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout)
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "protectedservice:", err)
		os.Exit(1)
	}
}

// run serves until ctx is done.
func run(ctx context.Context, args []string, out io.Writer) error {
	flags := flag.NewFlagSet("protectedservice", flag.ContinueOnError)
	flags.SetOutput(out)
	addr := flags.String("addr", "127.0.0.1:8081", "`address` to listen on")
	tenant := flags.String("tenant", "", "`ID` of the directory whose tokens count; one of its own if empty")
	audience := flags.String("audience", "https://myapp.aztoso.com", "App ID URI of the service, and its client ID, as `LIST`")
	role := flags.String("role", "consumer", "app `role` that callers must have")
	allow := flags.String("allow", "", "client or object IDs of callers that are let in without it, as `LIST`")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("there is an argument too many: %q", flags.Arg(0))
	}
	listener, err := net.Listen("tcp", *addr)
	if err != nil {
		return fmt.Errorf("-addr: %w", err)
	}
	g := &guard.Guard{Tenant: *tenant, Audiences: strings.Split(*audience, ","), Logger: slog.New(slog.NewTextHandler(out, nil))}
	if *tenant == "" {
		azure := newTenant(g.Audiences[0], *role)
		defer azure.Close()
		g.Tenant, g.Client = imdsfake.DefaultTenant, azure.Client()
		describe(out, azure, g.Audiences[0], "http://"+listener.Addr().String())
	}
	handler, err := newHandler(g, *role, *allow)
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second}
	end := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer end()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// newHandler returns what the service is there for, for those who may have it.
func newHandler(g *guard.Guard, role, allow string) (h http.Handler, err error) {
	defer func() {
		if p := recover(); p != nil { // of a Guard that is not set up
			err = fmt.Errorf("%v", p)
		}
	}()
	rule := guard.Role(role)
	if allow != "" {
		rule = guard.Any(rule, guard.Callers(strings.Split(allow, ",")...))
	}
	return g.Require(rule, http.HandlerFunc(greet)), nil
}

// greet says whom it has let in.
func greet(w http.ResponseWriter, r *http.Request) {
	caller, _ := guard.From(r.Context())
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"hello": caller.ClientID, "roles": caller.Roles})
}

const guest = "2a4c6e80-1b3d-4f57-9a8c-0e1d2c3b4a59"

// newTenant starts a metadata service for a host whose own identity has the role at
// the service, and for a guest who has not.
func newTenant(resource, role string) *imdsfake.Server {
	return imdsfake.NewServer(&imdsfake.Handler{
		Identities: []imdsfake.Identity{
			{Name: "host", SystemAssigned: true},
			{Name: "guest", ClientID: guest},
		},
		Apps: []imdsfake.App{{URI: resource, Roles: []imdsfake.AppRole{{
			Value: role, AllowedMemberTypes: []string{"Application"}, IsEnabled: true,
		}}}},
		Assignments: []imdsfake.Assignment{{Identity: "host", Resource: resource, Role: role}},
	})
}

// describe says what to try.
func describe(out io.Writer, azure *imdsfake.Server, resource, service string) {
	ask := fmt.Sprintf("curl -s -H Metadata:true '%s/metadata/identity/oauth2/token?api-version=2018-02-01&resource=%s",
		azure.URL, url.QueryEscape(resource))
	fmt.Fprintf(out, `A protected service is at %s, and a metadata service at %s. Try, with jq:

as the host, which has the role: 200
  curl -i -H "Authorization: Bearer $(%s' | jq -r .access_token)" %[1]s/
as a guest, who has not: 403
  curl -i -H "Authorization: Bearer $(%[3]s&client_id=%[4]s' | jq -r .access_token)" %[1]s/
as nobody: 401
  curl -i %[1]s/
`, service, azure.URL, ask, guest)
}
