package imdsfake_test

import (
	"fmt"
	"net/http"
	"time"

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

// A fault befalls the next requests, or all of them for a time.
func ExampleHandler_Inject() {
	fake := new(imdsfake.Handler)
	fake.Inject(
		imdsfake.Fault{Status: 429, RetryAfter: "1", Times: 2},
		imdsfake.Fault{Failure: imdsfake.Refuse, For: 12 * time.Hour},
	)
}
