package main

import (
	_ "embed"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"golang.org/x/oauth2"

	"github.com/aztoso/mitoken"
	"github.com/aztoso/mitoken/examples/protectedservice/guard"
	"github.com/aztoso/mitoken/imdsfake"
)

const (
	resource = "https://myapp.aztoso.com" // App ID URI of the protected service
	role     = "consumer"                 // what a caller of it must be

	tenant   = "7d8f0a6e-52c1-4f0b-9d3e-1b6a2c4e8f10"
	daemonID = "1f9b3c5d-7a2e-4c68-8b04-d5e6f7a8b9c0" // client IDs of the two callers
	guestID  = "2a4c6e80-1b3d-4f57-9a8c-0e1d2c3b4a59"
)

// manifest lists the app roles of the service, as `az ad app create --app-roles`
// takes it.
//
//go:embed manifest.json
var manifest []byte

// A site is all that the story needs of Azure, and the service, on this machine.
type site struct {
	azure   *imdsfake.Handler
	imds    *imdsfake.Server
	service *http.Server
	origin  string // of the service
}

// newSite starts a metadata service whose tokens have the lifetime, and a
// service that takes them.
func newSite(lifetime time.Duration) (*site, error) {
	roles, err := imdsfake.ParseManifest(manifest)
	if err != nil {
		return nil, fmt.Errorf("manifest.json: %w", err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	azure := &imdsfake.Handler{
		Tenant: tenant,
		Identities: []imdsfake.Identity{
			{Name: "daemon", ClientID: daemonID, SystemAssigned: true},
			{Name: "guest", ClientID: guestID},
		},
		Apps:        []imdsfake.App{{URI: resource, Roles: roles}},
		Assignments: []imdsfake.Assignment{{Identity: "daemon", Resource: resource, Role: role}},
		Lifetime:    lifetime,
		Cache:       imdsfake.NoCache,
	}
	s := &site{azure: azure, imds: imdsfake.NewServer(azure)}
	s.origin = "http://" + listener.Addr().String()
	g := &guard.Guard{
		Tenant:    tenant,
		Audiences: []string{resource},
		KeysURL:   s.imds.URL + "/" + tenant + "/discovery/keys",
	}
	s.service = &http.Server{
		Handler:           g.Require(guard.Role(role), http.HandlerFunc(greet)),
		ReadHeaderTimeout: time.Minute,
	}
	go s.service.Serve(listener) // until close
	return s, nil
}

// greet is what the service does for its callers.
func greet(w http.ResponseWriter, r *http.Request) {
	c, _ := guard.From(r.Context())
	fmt.Fprintf(w, "hello, %s", c.ClientID)
}

func (s *site) close() {
	_ = s.service.Close()
	s.imds.Close()
}

// client returns a client of the service that presents the tokens of a source.
// Its Origins are needed because the service is reached at an address that is
// not its App ID URI, and without TLS.
func (s *site) client(src oauth2.TokenSource) *http.Client {
	return &http.Client{
		Timeout: 10 * time.Second,
		Transport: &mitoken.Transport{
			Source:  src,
			Base:    &http.Transport{MaxIdleConnsPerHost: callers},
			Origins: []string{s.origin},
		},
	}
}

// requests returns how often the metadata service was asked for a token. The
// tenant's journal has the service's requests for keys, too.
func (s *site) requests() int {
	n := 0
	for _, r := range s.azure.Requests() {
		if r.Resource == resource {
			n++
		}
	}
	return n
}

// get makes a call with an Authorization header that is given, if it is not
// empty, and returns the response without its body.
func (s *site) get(authorization string) (*http.Response, error) {
	req, err := http.NewRequest(http.MethodGet, s.origin, nil)
	if err != nil {
		return nil, err
	}
	if authorization != "" {
		req.Header.Set("Authorization", authorization)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	return resp, resp.Body.Close()
}

// call makes one call, which has to succeed.
func (s *site) call(client *http.Client) error {
	resp, err := client.Get(s.origin)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return errors.New("the service answered " + resp.Status)
	}
	return drain(resp)
}
