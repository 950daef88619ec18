package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	azruntime "github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/AzureAD/microsoft-authentication-library-for-go/apps/managedidentity"
	"github.com/aztoso/mitoken"
	"golang.org/x/oauth2"
)

// A contestant is a way to have tokens. All are as their users have them: the
// defaults, with nothing replaced but the transport to the metadata service.
//
// MSAL means to refresh a token at half its life, but forgets to (see
// https://github.com/AzureAD/microsoft-authentication-library-for-go/issues/570),
// and azidentity and azcore's policy depend on it: up to v1.10.1 they ask for the
// next token in the last five minutes of the one in hand.
type contestant struct {
	name   string
	trials int // that it went through; see [suffer]

	// start returns a call that needs a token, and what ends it all.
	start func(t *testing.T, imds http.RoundTripper, resource string) (call, func())
}

// A call is what needs a token. It fails if there is none.
type call func(context.Context) error

var contestants = []*contestant{
	{name: "mitoken", start: startMitoken},
	{name: "azidentity", start: startAzidentity},
	{name: "MSAL", start: startMSAL},
	{name: "azcore's policy over azidentity", start: startPolicy},
	{name: "x/oauth2's ReuseTokenSource", start: startOauth2},
}

func startMitoken(_ *testing.T, imds http.RoundTripper, resource string) (call, func()) {
	cred := &mitoken.Credential{IMDSTransport: imds}
	src := cred.TokenSource(resource)
	call := func(ctx context.Context) error { _, err := src.TokenContext(ctx); return err }
	return call, func() { cred.Close() }
}

func newAzidentity(t *testing.T, imds http.RoundTripper) *azidentity.ManagedIdentityCredential {
	cred, err := azidentity.NewManagedIdentityCredential(&azidentity.ManagedIdentityCredentialOptions{
		ClientOptions: azcore.ClientOptions{Transport: &http.Client{Transport: imds}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return cred
}

func startAzidentity(t *testing.T, imds http.RoundTripper, resource string) (call, func()) {
	cred := newAzidentity(t, imds)
	opts := policy.TokenRequestOptions{Scopes: []string{resource + "/.default"}}
	return func(ctx context.Context) error {
		_, err := cred.GetToken(ctx, opts)
		return err
	}, func() {}
}

func startMSAL(t *testing.T, imds http.RoundTripper, resource string) (call, func()) {
	client, err := managedidentity.New(managedidentity.SystemAssigned(),
		managedidentity.WithHTTPClient(&http.Client{Transport: imds}))
	if err != nil {
		t.Fatal(err)
	}
	return func(ctx context.Context) error {
		_, err := client.AcquireToken(ctx, resource)
		return err
	}, func() {}
}

func startPolicy(t *testing.T, imds http.RoundTripper, resource string) (call, func()) {
	pipeline := azruntime.NewPipeline("outages", "v1", azruntime.PipelineOptions{
		PerRetry: []policy.Policy{
			azruntime.NewBearerTokenPolicy(newAzidentity(t, imds), []string{resource + "/.default"}, nil),
		},
	}, &policy.ClientOptions{Transport: service{}})
	call := func(ctx context.Context) error {
		req, err := azruntime.NewRequest(ctx, http.MethodGet, "https://service.example")
		if err != nil {
			return err
		}
		_, err = pipeline.Do(req)
		return err
	}
	return call, func() {}
}

// service is the one that is called. It has no outage.
type service struct{}

func (service) Do(req *http.Request) (*http.Response, error) {
	return &http.Response{
		StatusCode: http.StatusOK, Header: http.Header{}, Body: http.NoBody, Request: req,
	}, nil
}

func startOauth2(_ *testing.T, imds http.RoundTripper, resource string) (call, func()) {
	src := oauth2.ReuseTokenSource(nil, &source{&http.Client{Transport: imds}, resource})
	return func(context.Context) error { _, err := src.Token(); return err }, func() {}
}

// source is the source that a user of x/oauth2 writes, who takes no context
// either. It gives up on a request when a caller would.
type source struct {
	client   *http.Client
	resource string
}

func (s *source) Token() (*oauth2.Token, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	target := "http://169.254.169.254/metadata/identity/oauth2/token" +
		"?api-version=2018-02-01&resource=" + url.QueryEscape(s.resource)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Metadata", "true")
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the metadata service answered %s", resp.Status)
	}
	var answer struct {
		AccessToken string `json:"access_token"`
		ExpiresOn   string `json:"expires_on"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return nil, err
	}
	expiry, err := strconv.ParseInt(answer.ExpiresOn, 10, 64)
	return &oauth2.Token{AccessToken: answer.AccessToken, Expiry: time.Unix(expiry, 0)}, err
}
