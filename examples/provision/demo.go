package main

import (
	"context"
	_ "embed"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/aztoso/mitoken"
	"github.com/aztoso/mitoken/examples/protectedservice/guard"
	"github.com/aztoso/mitoken/imdsfake"
)

// This file is the whole way on one machine: the tenant is package imdsfake's, the
// service is guarded by that of examples/protectedservice, and the calls of
// Microsoft Graph are those of graph.go.

// manifest is what "az ad app create --app-roles" takes.
//
//go:embed manifest.json
var manifest []byte

const (
	resource = "https://myapp.aztoso.com"
	adminID  = "ad000000-0000-4000-8000-000000000001"
	daemonID = "da000000-0000-4000-8000-000000000001"

	// A day in the life of this demo's tokens. IMDS gives out a new one when half
	// of it is over.
	lifetime = 10 * time.Second
)

func demo(ctx context.Context, out io.Writer) error {
	roles, err := imdsfake.ParseManifest(manifest)
	if err != nil {
		return err
	}
	azure := imdsfake.NewServer(&imdsfake.Handler{
		Identities: []imdsfake.Identity{{Name: "admin", ClientID: adminID}, {Name: "daemon", ClientID: daemonID}},
		Apps:       []imdsfake.App{{URI: resource, DisplayName: "My app", Roles: roles}},
		Assignments: []imdsfake.Assignment{
			{Identity: "admin", Resource: graph, Role: "Application.Read.All"},
			{Identity: "admin", Resource: graph, Role: "AppRoleAssignment.ReadWrite.All"},
		},
		Lifetime: lifetime,
		Cache:    imdsfake.UntilHalfLife,
	})
	defer azure.Close()
	g := &guard.Guard{Tenant: imdsfake.DefaultTenant, Audiences: []string{resource}, Client: azure.Client()}
	service := httptest.NewServer(g.Require(guard.Role("consumer"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "welcome")
	})))
	defer service.Close()

	daemon := &mitoken.Credential{ID: azidentity.ClientID(daemonID), Endpoint: azure.URL}
	defer daemon.Close()
	src := daemon.TokenSource(resource)
	client := &http.Client{Transport: &mitoken.Transport{Source: src, Origins: []string{service.URL}}}
	defer client.CloseIdleConnections()
	expect := func(want int, why string) error {
		resp, err := client.Get(service.URL)
		if err != nil {
			return err
		}
		resp.Body.Close()
		fmt.Fprintf(out, "   the daemon calls the service: %s. %s\n", resp.Status, why)
		if resp.StatusCode != want {
			return fmt.Errorf("the service answered %s, not %d", resp.Status, want)
		}
		return nil
	}

	fmt.Fprintf(out, "1. %s is registered, with the app role consumer of manifest.json, and has a service principal.\n", resource)
	if err := expect(http.StatusForbidden, "It has a token, as every identity of the tenant, but no role."); err != nil {
		return err
	}
	before := src.Status().Expiry

	fmt.Fprintln(out, "2. An administrator assigns the role to the daemon, through Microsoft Graph, and once more to be sure.")
	admin := &mitoken.Credential{ID: azidentity.ClientID(adminID), Endpoint: azure.URL}
	defer admin.Close()
	d := newDirectory(admin, azure.Client().Transport)
	for range 2 {
		fmt.Fprint(out, "   ")
		if err := d.provision(ctx, out, resource, "consumer", daemonID); err != nil {
			return err
		}
	}
	if err := expect(http.StatusForbidden, "The token is still the one from before: roles are in the next one."); err != nil {
		return err
	}

	fmt.Fprintf(out, "3. Tokens live %v here, not 24 hours, so the refresh at half of that comes soon.\n", lifetime)
	for !src.Status().Expiry.After(before) {
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return expect(http.StatusOK, "The role is in the new token.")
}
