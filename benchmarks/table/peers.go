package main

import (
	"context"
	"fmt"
	"net/http"
	"sync/atomic"
	"time"

	googleauth "cloud.google.com/go/auth"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	azruntime "github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	msal "github.com/AzureAD/microsoft-authentication-library-for-go/apps/managedidentity"
	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aztoso/mitoken"
	"github.com/aztoso/mitoken/imdsfake"
	hashiauth "github.com/hashicorp/go-azure-sdk/sdk/auth"
	"golang.org/x/oauth2"
	clientgo "k8s.io/client-go/transport"
)

// This file is who is measured: each gets its tokens from the same fake, and has
// one in its cache before the clock starts.

const resource = "https://service.example"

var scope = policy.TokenRequestOptions{Scopes: []string{resource + "/.default"}}

// A contestant hands out a cached token.
type contestant struct {
	name string
	get  func(context.Context) error
}

// floor is what a cache cannot do without that looks at the clock: an atomic load,
// and a look.
func floor(tok *oauth2.Token) contestant {
	var held atomic.Pointer[oauth2.Token]
	held.Store(tok)
	return contestant{"the floor", func(context.Context) error {
		if !time.Now().Before(held.Load().Expiry) {
			return context.DeadlineExceeded
		}
		return nil
	}}
}

// newSource returns a source with a token, and what ends it.
func newSource() (*mitoken.Credential, *mitoken.TokenSource, *oauth2.Token) {
	cred := &mitoken.Credential{IMDSTransport: new(imdsfake.Handler)}
	src := cred.TokenSource(resource)
	return cred, src, must(src.Token())
}

// peers are the caches that a Go program might have in place of ours.
func peers(src oauth2.TokenSource) []contestant {
	ctx := context.Background()
	client := &http.Client{Transport: new(imdsfake.Handler)}
	reuse := oauth2.ReuseTokenSource(nil, src)
	google := googleauth.NewCachedTokenProvider(googleProvider{src}, nil)
	amazon := aws.NewCredentialsCache(aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
		tok, err := src.Token()
		return aws.Credentials{AccessKeyID: "id", SecretAccessKey: tok.AccessToken, CanExpire: true, Expires: tok.Expiry}, err
	}))
	hashi := must(hashiauth.NewCachedAuthorizer(authorizer{src}))
	kubernetes := clientgo.NewCachedTokenSource(src)
	identity := must(azidentity.NewManagedIdentityCredential(&azidentity.ManagedIdentityCredentialOptions{
		ClientOptions: azcore.ClientOptions{Transport: client},
	}))
	library := must(msal.New(msal.SystemAssigned(), msal.WithHTTPClient(client)))
	pipeline := azruntime.NewPipeline("benchmarks", "v1", azruntime.PipelineOptions{
		PerRetry: []policy.Policy{azruntime.NewBearerTokenPolicy(identity, scope.Scopes, nil)},
	}, &policy.ClientOptions{Transport: &http.Client{Transport: sink{}}})
	return []contestant{
		{"x/oauth2's ReuseTokenSource", func(context.Context) error { _, err := reuse.Token(); return err }},
		{"Google's CachedTokenProvider", func(ctx context.Context) error { _, err := google.Token(ctx); return err }},
		{"AWS's CredentialsCache", func(ctx context.Context) error { _, err := amazon.Retrieve(ctx); return err }},
		{"HashiCorp's CachedAuthorizer", func(ctx context.Context) error { _, err := hashi.Token(ctx, nil); return err }},
		{"client-go's CachedTokenSource", func(context.Context) error { _, err := kubernetes.Token(); return err }},
		{"MSAL Go", func(ctx context.Context) error { _, err := library.AcquireToken(ctx, resource); return err }},
		{"azidentity", func(ctx context.Context) error { _, err := identity.GetToken(ctx, scope); return err }},
		{"azcore's bearer policy, with its pipeline", func(context.Context) error {
			req, err := azruntime.NewRequest(ctx, http.MethodGet, resource)
			if err == nil {
				_, err = pipeline.Do(req)
			}
			return err
		}},
	}
}

// transports attach a token to a request with five headers.
func transports(src *mitoken.TokenSource) []contestant {
	req := must(http.NewRequest(http.MethodGet, resource+"/orders", nil))
	for _, name := range []string{"Accept", "Content-Type", "Traceparent", "User-Agent", "X-Request-Id"} {
		req.Header.Set(name, "value")
	}
	through := func(rt http.RoundTripper) func(context.Context) error {
		return func(context.Context) error { _, err := rt.RoundTrip(req); return err }
	}
	return []contestant{
		{"mitoken", through(&mitoken.Transport{Source: src, Base: sink{}})},
		{"x/oauth2", through(&oauth2.Transport{Source: oauth2.ReuseTokenSource(nil, src), Base: sink{}})},
		{"client-go", through(clientgo.TokenSourceWrapTransport(oauth2.ReuseTokenSource(nil, src))(sink{}))},
	}
}

type googleProvider struct{ src oauth2.TokenSource }

func (p googleProvider) Token(context.Context) (*googleauth.Token, error) {
	tok, err := p.src.Token()
	if err != nil {
		return nil, err
	}
	return &googleauth.Token{Value: tok.AccessToken, Type: "Bearer", Expiry: tok.Expiry}, nil
}

type authorizer struct{ src oauth2.TokenSource }

func (a authorizer) Token(context.Context, *http.Request) (*oauth2.Token, error) {
	return a.src.Token()
}

func (a authorizer) AuxiliaryTokens(context.Context, *http.Request) ([]*oauth2.Token, error) {
	return nil, nil
}

// issuer issues tokens for whatever it is asked.
type issuer struct{}

func (issuer) GetToken(context.Context, policy.TokenRequestOptions) (azcore.AccessToken, error) {
	return azcore.AccessToken{Token: "token", ExpiresOn: time.Now().Add(24 * time.Hour)}, nil
}

// sink is a service that costs nothing.
type sink struct{}

var nothing = &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}

func (sink) RoundTrip(*http.Request) (*http.Response, error) { return nothing, nil }

func must[T any](v T, err error) T {
	if err != nil {
		panic(fmt.Sprint("it cannot be set up: ", err))
	}
	return v
}

func tokenOptions(resource string) policy.TokenRequestOptions {
	return policy.TokenRequestOptions{Scopes: []string{resource + "/.default"}}
}
