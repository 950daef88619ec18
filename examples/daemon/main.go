// Daemon calls a protected service every so often, as its managed identity. It is
// a program to copy: flags and environment, signals, a health endpoint, logs, and
// a fallback for a developer's machine.
//
//	daemon -resource https://myapp.aztoso.com -url https://myapp.aztoso.com/orders
//
// What kind of host it runs on, and so how it gets its tokens, it finds out.
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
	"syscall"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/aztoso/mitoken"
)

// A config is what flags and environment say.
type config struct {
	resource string
	url      string
	origin   string // of the URL: who may get the token
	every    time.Duration
	listen   string
	clientID string
	imds     string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "daemon:", err)
		os.Exit(1)
	}
}

// run works until ctx is done.
func run(ctx context.Context, args []string, out io.Writer) error {
	c, err := parse(args, out)
	if err != nil {
		return err
	}
	logger := slog.New(slog.NewJSONHandler(out, nil))
	cred, err := c.credential(logger)
	if err != nil {
		return err
	}
	defer cred.Close()
	src := cred.TokenSource(c.resource)

	listener, err := net.Listen("tcp", c.listen)
	if err != nil {
		return fmt.Errorf("-listen: %w", err)
	}
	health := &http.Server{Handler: healthHandler(src), ReadHeaderTimeout: 10 * time.Second}
	go health.Serve(listener) // until Close
	defer health.Close()
	logger.Info("started", "health", "http://"+listener.Addr().String()+"/healthz")

	client := &http.Client{
		Transport: &mitoken.Transport{Source: src, Origins: []string{c.origin}},
		Timeout:   30 * time.Second,
	}
	defer client.CloseIdleConnections()
	ticker := time.NewTicker(c.every)
	defer ticker.Stop()
	for {
		work(ctx, client, c.url, logger)
		select {
		case <-ticker.C:
		case <-ctx.Done():
			logger.Info("stopped")
			return nil
		}
	}
}

// parse reads the flags. What they leave out is taken from the environment.
func parse(args []string, out io.Writer) (*config, error) {
	c := new(config)
	flags := flag.NewFlagSet("daemon", flag.ContinueOnError)
	flags.SetOutput(out)
	flags.StringVar(&c.resource, "resource", os.Getenv("DAEMON_RESOURCE"),
		"App ID `URI` of the service to call (DAEMON_RESOURCE)")
	flags.StringVar(&c.url, "url", os.Getenv("DAEMON_URL"), "`URL` to call; the resource if empty (DAEMON_URL)")
	flags.DurationVar(&c.every, "every", time.Minute, "`time` between calls")
	flags.StringVar(&c.listen, "listen", "127.0.0.1:8080", "`address` of the health endpoint")
	flags.StringVar(&c.clientID, "client-id", os.Getenv("DAEMON_CLIENT_ID"),
		"client `ID` of a user-assigned identity; the host's default one if empty (DAEMON_CLIENT_ID)")
	flags.StringVar(&c.imds, "imds", os.Getenv("DAEMON_IMDS"),
		"base `URL` of the metadata service, for tests (DAEMON_IMDS)")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	switch {
	case flags.NArg() > 0:
		return nil, fmt.Errorf("there is an argument too many: %q", flags.Arg(0))
	case c.resource == "":
		return nil, errors.New("-resource is missing: the App ID URI of the service to call")
	case c.every < time.Second:
		return nil, fmt.Errorf("-every %v is less than a second", c.every)
	}
	if c.url == "" {
		c.url = c.resource
	}
	u, err := url.Parse(c.url)
	if err != nil || u.Host == "" {
		return nil, fmt.Errorf("-url %q is no URL", c.url)
	}
	c.origin = u.Scheme + "://" + u.Host
	return c, nil
}

// credential returns the identity of the host that this runs on. On a developer's
// machine, which has none, it is who is logged in there.
func (c *config) credential(logger *slog.Logger) (*mitoken.Credential, error) {
	developer, err := azidentity.NewDefaultAzureCredential(nil)
	if err != nil {
		return nil, err
	}
	cred := &mitoken.Credential{Endpoint: c.imds, Fallback: developer, Logger: logger}
	if c.clientID != "" {
		cred.ID = azidentity.ClientID(c.clientID)
	}
	return cred, nil
}

// work is what the daemon is there for: one call. A failure is logged, and the next
// call is another try.
func work(ctx context.Context, client *http.Client, target string, logger *slog.Logger) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		logger.Error("the call cannot be made", "error", err)
		return
	}
	resp, err := client.Do(req)
	if err != nil {
		if ctx.Err() == nil {
			logger.Error("the call failed", "error", err)
		}
		return
	}
	defer resp.Body.Close()
	n, err := io.Copy(io.Discard, resp.Body)
	logger.Info("called", "status", resp.StatusCode, "bytes", n, "error", err)
}

// healthHandler answers for as long as there is a valid token, and tells how long
// an outage would be survived.
func healthHandler(src *mitoken.TokenSource) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		status := src.Status()
		w.Header().Set("Content-Type", "application/json")
		if status.Survives == 0 {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		_ = json.NewEncoder(w).Encode(status) // a client that has left wants nothing
	})
	return mux
}
