package mitoken_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/aztoso/mitoken"
	"github.com/aztoso/mitoken/imdsfake"
)

// On a host on Azure, the zero Credential is all it takes.
func Example() {
	var cred mitoken.Credential
	defer cred.Close()

	client := &http.Client{Transport: &mitoken.Transport{
		Source: cred.TokenSource("https://myapp.aztoso.com"),
	}}
	resp, err := client.Get("https://myapp.aztoso.com/orders")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer resp.Body.Close()
	fmt.Println(resp.Status)
}

// A user-assigned identity, and a credential for the machine of a developer who
// has logged in with the Azure CLI.
func ExampleCredential() {
	cli, err := azidentity.NewAzureCLICredential(nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	cred := &mitoken.Credential{
		ID:       azidentity.ClientID("1f9b3c5d-7a2e-4c68-8b04-d5e6f7a8b9c0"),
		Fallback: cli,
	}
	defer cred.Close()
}

// An Azure SDK client takes a Credential where it takes one of azidentity's, and
// asks it like this.
func ExampleCredential_GetToken() {
	cred := &mitoken.Credential{IMDSTransport: new(imdsfake.Handler)}
	defer cred.Close()

	tok, err := cred.GetToken(context.Background(), policy.TokenRequestOptions{
		Scopes: []string{"https://vault.azure.net/.default"},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("expires in", time.Until(tok.ExpiresOn).Round(time.Hour))
	// Output: expires in 24h0m0s
}

// A service whose address is not its App ID URI is listed. In a test, it may be
// one on a loopback address.
func ExampleTransport() {
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Println("authorized:", r.Header.Get("Authorization") != "")
	}))
	defer service.Close()

	cred := &mitoken.Credential{IMDSTransport: new(imdsfake.Handler)}
	defer cred.Close()
	client := &http.Client{Transport: &mitoken.Transport{
		Source:  cred.TokenSource("https://myapp.aztoso.com"),
		Origins: []string{service.URL},
	}}

	resp, err := client.Get(service.URL)
	if err != nil {
		fmt.Println(err)
		return
	}
	resp.Body.Close()
	_, err = client.Get("https://elsewhere.example/")
	fmt.Println(err)
	// Output:
	// authorized: true
	// Get "https://elsewhere.example/": mitoken: no token goes to "https://elsewhere.example": Transport.Origins does not list it
}

// A health page shows the state of a source as it is.
func ExampleTokenSource_Status() {
	cred := &mitoken.Credential{IMDSTransport: new(imdsfake.Handler)}
	defer cred.Close()
	src := cred.TokenSource("https://myapp.aztoso.com")

	health := func(w http.ResponseWriter, _ *http.Request) {
		status := src.Status()
		if status.Survives == 0 {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		_ = json.NewEncoder(w).Encode(status)
	}

	w := httptest.NewRecorder()
	health(w, nil)
	fmt.Print(w.Code, " ", w.Body)
	// Output: 503 {"state":"empty","source":"imds","failures":0,"repeats":0,"survives_ns":0}
}
