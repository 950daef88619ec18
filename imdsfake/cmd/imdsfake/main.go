// Imdsfake serves a fake Azure instance metadata service, to run programs that
// use managed identities against, in any language:
//
//	go run ./imdsfake/cmd/imdsfake
//
// Without a configuration file, its tenant has an identity of the host, "host",
// another one, "daemon", and an app that declares the roles of a manifest. The
// host has all of them, the daemon none. With one:
//
//	go run ./imdsfake/cmd/imdsfake -config imdsfake.yaml
//
// it has what the file says: see the example in testdata. There is a page for
// people at /, and controls for tests below /imdsfake/.
package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/aztoso/mitoken/imdsfake"
)

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
	c, err := parseFlags(args, out)
	if err != nil {
		return err
	}
	fake := c.handler()
	if err := fake.Check(); err != nil {
		return err
	}
	defer fake.Close()
	fake.Inject(c.Faults...)
	plain, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return fmt.Errorf("cannot listen (see -addr): %w", err)
	}
	listeners := []net.Listener{plain}
	if c.ListenTLS != "" {
		secure, err := tls.Listen("tcp", c.ListenTLS, &tls.Config{Certificates: []tls.Certificate{fake.Certificate()}})
		if err != nil {
			return errors.Join(fmt.Errorf("cannot listen (see -tls): %w", err), plain.Close())
		}
		listeners = append(listeners, secure)
	}
	describe(out, fake, listeners)
	return serve(ctx, fake, listeners)
}

// serve serves on all listeners until ctx is done. Requests that hang end then.
func serve(ctx context.Context, fake *imdsfake.Handler, listeners []net.Listener) error {
	secure := ""
	if len(listeners) > 1 {
		secure = baseURL("https", listeners[1])
	}
	server := &http.Server{
		Handler:           newHandler(fake, secure),
		ReadHeaderTimeout: 10 * time.Second,
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	end := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer end()
	ended := make(chan error, len(listeners))
	for _, l := range listeners {
		go func() { ended <- server.Serve(l) }()
	}
	var first error
	for range listeners {
		if err := <-ended; !errors.Is(err, http.ErrServerClosed) && first == nil {
			first = err
			_ = server.Close()
		}
	}
	return first
}

// newHandler returns the fake with its page and its controls.
func newHandler(fake *imdsfake.Handler, secure string) http.Handler {
	page, controls := newPage(fake), newControls(fake, secure)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/":
			page.ServeHTTP(w, r)
		case strings.HasPrefix(r.URL.Path, "/imdsfake/"):
			controls.ServeHTTP(w, r)
		default:
			fake.ServeHTTP(w, r)
		}
	})
}

// parseFlags returns the configuration that a command line means. Its flags have
// precedence over the file.
func parseFlags(args []string, out io.Writer) (*config, error) {
	flags := flag.NewFlagSet("imdsfake", flag.ContinueOnError)
	flags.SetOutput(out)
	addr := flags.String("addr", "", "`address` to listen on; whoever reaches it gets tokens of the fake (127.0.0.1:8169 if neither it nor the file says another)")
	addrTLS := flags.String("tls", "", "`address` to listen on for https, too, which Service Fabric wants")
	file := flags.String("config", "", "`file` with the configuration, in YAML or JSON")
	uri := flags.String("app", "", "App ID `URI` of the service, if there is no file (https://myapp.aztoso.com)")
	manifest := flags.String("manifest", "",
		"`file` with the app roles of the service, as az ad app create --app-roles takes it, if there is no -config")
	lifetime := flags.Duration("lifetime", 0, "`duration` that tokens live (24h)")
	cache := flags.String("cache", "", "how long IMDS gives out a token again: `until-expiry`, until-half-life, "+
		"until-last-minutes, none, alternating, older-after-newer or aged-first")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	if flags.NArg() > 0 {
		return nil, fmt.Errorf("there is an argument too many: %q", flags.Arg(0))
	}
	c, err := defaults(*uri, *manifest)
	if *file != "" {
		if *uri != "" || *manifest != "" {
			return nil, errors.New("-app and -manifest are for a start without -config: the file has the apps")
		}
		c, err = readConfig(*file)
	}
	if err != nil {
		return nil, err
	}
	c.Listen = cmp.Or(*addr, c.Listen, "127.0.0.1:8169")
	c.ListenTLS = cmp.Or(*addrTLS, c.ListenTLS)
	c.Lifetime = cmp.Or(*lifetime, c.Lifetime)
	c.Cache = cmp.Or(imdsfake.Cache(*cache), c.Cache)
	return c, nil
}

// consumer is the role of an app that has no manifest.
var consumer = []imdsfake.AppRole{{
	AllowedMemberTypes: []string{"Application"},
	Description:        "Consumers can use the service",
	DisplayName:        "Consumer",
	IsEnabled:          true,
	Value:              "consumer",
}}

// defaults returns the configuration if there is no file.
func defaults(uri, manifest string) (*config, error) {
	service := app{Manifest: manifest}
	service.URI = cmp.Or(uri, "https://myapp.aztoso.com")
	if manifest == "" {
		service.Roles = consumer
	} else if err := service.readManifest(""); err != nil {
		return nil, fmt.Errorf("-manifest: %w", err)
	}
	c := &config{
		Identities: []imdsfake.Identity{
			{Name: "host", SystemAssigned: true},
			{Name: "daemon", ClientID: "da000000-0000-4000-8000-000000000001"},
		},
		Apps: []app{service},
	}
	for _, r := range service.Roles {
		c.Assignments = append(c.Assignments,
			imdsfake.Assignment{Identity: "host", Resource: service.URI, Role: r.Value})
	}
	return c, nil
}

// describe tells what is served, and how to try it.
func describe(out io.Writer, fake *imdsfake.Handler, listeners []net.Listener) {
	base := baseURL("http", listeners[0])
	d := fake.Directory()
	fmt.Fprintf(out, "A fake instance metadata service is at %s, with a page for people.\n\n", base)
	fmt.Fprintf(out, "tenant    %s\n", d.Tenant)
	fmt.Fprintf(out, "issuer    %s, with its keys at %s/%s/discovery/keys\n", d.Issuer, base, d.Tenant)
	for _, a := range d.Apps {
		var roles []string
		for _, r := range a.Roles {
			roles = append(roles, r.Value)
		}
		fmt.Fprintf(out, "app       %s, which declares %s\n", a.URI, cmp.Or(strings.Join(roles, ", "), "no roles"))
	}
	for _, id := range d.Identities {
		how := "with client_id=" + id.ClientID
		if id.SystemAssigned {
			how = "which who asks for none gets"
		}
		fmt.Fprintf(out, "identity  %s, %s%s\n", id.Name, how, rolesOf(d, id))
	}
	for _, sp := range d.ServicePrincipals {
		id := imdsfake.Identity{Name: sp.Name}
		fmt.Fprintf(out, "principal %s, with the client ID %s%s\n", sp.Name, sp.ClientID, rolesOf(d, id))
	}
	fmt.Fprint(out, "\nClients find it in the place of a host with these variables:\n\n")
	for _, h := range hosts {
		at := base
		if h.host == imdsfake.ServiceFabric || h.host == imdsfake.Entra {
			if len(listeners) == 1 {
				fmt.Fprintf(out, "  %-15s see -tls\n", h.host)
				continue
			}
			at = baseURL("https", listeners[1])
		}
		for i, line := range variables(fake, h.host, at) {
			name := string(h.host)
			if i > 0 {
				name = ""
			}
			fmt.Fprintf(out, "  %-15s %s\n", name, line)
		}
	}
	if len(listeners) > 1 {
		fmt.Fprintf(out, "\nThe certificate of https is at %s/imdsfake/certificate.\n", base)
	}
	fmt.Fprintf(out, "\ncurl -s -H Metadata:true '%s/metadata/identity/oauth2/token"+
		"?api-version=2018-02-01&resource=%s'\n", base, url.QueryEscape(d.Apps[0].URI))
}

// baseURL is where a listener is found on this machine.
func baseURL(scheme string, l net.Listener) string {
	host, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		return scheme + "://" + l.Addr().String()
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	return scheme + "://" + net.JoinHostPort(host, port)
}

// rolesOf tells which app roles an identity has.
func rolesOf(d imdsfake.Directory, id imdsfake.Identity) string {
	var text strings.Builder
	for _, a := range d.Assignments {
		if a.Identity == id.Name {
			fmt.Fprintf(&text, "; it has %s at %s", cmp.Or(a.Role, "default access"), a.Resource)
		}
	}
	return text.String()
}
