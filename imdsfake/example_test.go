package imdsfake_test

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/aztoso/mitoken"
	"github.com/aztoso/mitoken/imdsfake"
)

// In memory, the fake stands in for the transport of whatever asks it.
func ExampleHandler() {
	fake := &imdsfake.Handler{Lifetime: time.Hour}
	cred := &mitoken.Credential{IMDSTransport: fake}
	defer cred.Close()

	tok, err := cred.TokenSource("https://myapp.aztoso.com").Token()
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("expires in", time.Until(tok.Expiry).Round(time.Minute))
	for _, r := range fake.Requests() {
		fmt.Println(r.Method, r.Resource, r.Status)
	}
	// Output:
	// expires in 1h0m0s
	// GET https://myapp.aztoso.com 200
}

// On a port, it serves clients in any language. Those that cannot be told its
// URL can be given the Server's client, which ends up there whatever it asks for.
func ExampleServer() {
	srv := imdsfake.NewServer(nil)
	defer srv.Close()

	req, _ := http.NewRequest("GET", "http://169.254.169.254/metadata/identity/oauth2/token"+
		"?api-version=2018-02-01&resource=https%3A%2F%2Fmyapp.aztoso.com", nil)
	resp, err := srv.Client().Do(req) // without the header that the service wants
	if err != nil {
		fmt.Println(err)
		return
	}
	resp.Body.Close()
	fmt.Println(resp.Status)
	// Output: 400 Bad Request
}

// A fault befalls the next requests, or all of them for a time, or some.
func ExampleHandler_Inject() {
	fake := new(imdsfake.Handler)
	fake.Inject(
		imdsfake.Fault{Status: 429, RetryAfter: "1", Times: 2},
		imdsfake.Fault{Status: 410, For: 70 * time.Second}, // an upgrade of IMDS
		imdsfake.Fault{Fields: map[string]any{"expires_on": "soon"}, Probability: 0.1},
		imdsfake.Fault{Failure: imdsfake.Refuse, Resource: "https://myapp.aztoso.com"},
	)
}

// Clients of other makers find the fake in the place of App Service, or of
// another host, by their environment.
func ExampleServer_Env() {
	srv := imdsfake.NewServer(nil)
	defer srv.Close()
	for name, value := range srv.Env(imdsfake.AppService) {
		os.Setenv(name, value) // in a test, t.Setenv
		defer os.Unsetenv(name)
	}
	options := &azidentity.ManagedIdentityCredentialOptions{}
	options.Transport = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	cred, err := azidentity.NewManagedIdentityCredential(options)
	if err != nil {
		fmt.Println(err)
		return
	}
	_, err = cred.GetToken(context.Background(), policy.TokenRequestOptions{Scopes: []string{"api://example/.default"}})
	if err != nil {
		fmt.Println(err)
		return
	}
	r := srv.Handler.Requests()[0]
	fmt.Println(r.Host, r.Resource, r.Reason)
	// Output: App Service api://example a new token
}

// A test of something that works in the background waits for what it asks.
func ExampleHandler_WaitFor() {
	fake := new(imdsfake.Handler)
	cred := &mitoken.Credential{IMDSTransport: fake}
	defer cred.Close()
	go cred.TokenSource("api://example").Token()

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	found, err := fake.WaitFor(ctx, 1, func(r imdsfake.Request) bool { return r.Resource == "api://example" })
	fmt.Println(len(found), err)
	// Output: 1 <nil>
}
