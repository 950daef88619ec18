// Realclients gets tokens with clients in Go that know nothing of the fake, at
// the one address where they look for the metadata service, and verifies the
// tokens with two validators. The script "run" sees to it that the fake is at
// that address.
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	msal "github.com/AzureAD/microsoft-authentication-library-for-go/apps/managedidentity"
	"github.com/MicahParks/keyfunc/v3"
	"github.com/aztoso/mitoken"
	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/golang-jwt/jwt/v5"
)

const (
	endpoint = "http://169.254.169.254/"
	resource = "https://myapp.aztoso.com"
	tenant   = "11111111-2222-4333-8444-555555555555"
	issuer   = "https://sts.windows.net/" + tenant + "/"
	daemon   = "da000000-0000-4000-8000-000000000001"
)

// clients get a token each, of the host's identity unless they say otherwise.
var clients = []struct {
	name   string
	daemon bool
	token  func(context.Context) (string, error)
}{
	{"azidentity", false, func(ctx context.Context) (string, error) {
		return of(ctx)(azidentity.NewManagedIdentityCredential(nil))
	}},
	{"azidentity, user-assigned", true, func(ctx context.Context) (string, error) {
		return of(ctx)(azidentity.NewManagedIdentityCredential(
			&azidentity.ManagedIdentityCredentialOptions{ID: azidentity.ClientID(daemon)}))
	}},
	{"azidentity's default credential", false, func(ctx context.Context) (string, error) {
		cred, err := azidentity.NewDefaultAzureCredential(nil)
		if err != nil {
			return "", err
		}
		return token(ctx, cred)
	}},
	{"MSAL Go", false, func(ctx context.Context) (string, error) { return msalToken(ctx, msal.SystemAssigned()) }},
	{"MSAL Go, user-assigned", true, func(ctx context.Context) (string, error) {
		return msalToken(ctx, msal.UserAssignedClientID(daemon))
	}},
	{"mitoken", false, func(ctx context.Context) (string, error) {
		var cred mitoken.Credential
		defer cred.Close()
		tok, err := cred.TokenSource(resource).TokenContext(ctx)
		if err != nil {
			return "", err
		}
		return tok.AccessToken, nil
	}},
	{"mitoken, user-assigned", true, func(ctx context.Context) (string, error) {
		cred := &mitoken.Credential{ID: azidentity.ClientID(daemon)}
		defer cred.Close()
		return token(ctx, cred)
	}},
}

func token(ctx context.Context, cred azcore.TokenCredential) (string, error) {
	tok, err := cred.GetToken(ctx, policy.TokenRequestOptions{Scopes: []string{resource + "/.default"}})
	return tok.Token, err
}

// of returns the token of a credential that has just been made.
func of(ctx context.Context) func(*azidentity.ManagedIdentityCredential, error) (string, error) {
	return func(cred *azidentity.ManagedIdentityCredential, err error) (string, error) {
		if err != nil {
			return "", err
		}
		return token(ctx, cred)
	}
}

func msalToken(ctx context.Context, id msal.ID) (string, error) {
	client, err := msal.New(id)
	if err != nil {
		return "", err
	}
	result, err := client.AcquireToken(ctx, resource)
	return result.AccessToken, err
}

// claims are those that a service looks at.
type claims struct {
	jwt.RegisteredClaims
	AppID string   `json:"appid"`
	OID   string   `json:"oid"`
	Roles []string `json:"roles"`
}

// withOIDC verifies a token with go-oidc.
func withOIDC(ctx context.Context, token string) (c claims, err error) {
	provider, err := oidc.NewProvider(oidc.InsecureIssuerURLContext(ctx, issuer), endpoint+tenant)
	if err != nil {
		return c, err
	}
	tok, err := provider.Verifier(&oidc.Config{ClientID: resource}).Verify(ctx, token)
	if err != nil {
		return c, err
	}
	return c, tok.Claims(&c)
}

// withKeyfunc verifies a token with golang-jwt and keyfunc.
func withKeyfunc(ctx context.Context, token string) (c claims, err error) {
	keys, err := keyfunc.NewDefaultCtx(ctx, []string{endpoint + tenant + "/discovery/keys"})
	if err != nil {
		return c, err
	}
	_, err = jwt.ParseWithClaims(token, &c, keys.Keyfunc, jwt.WithAudience(resource), jwt.WithIssuer(issuer),
		jwt.WithExpirationRequired(), jwt.WithValidMethods([]string{"RS256"}))
	return c, err
}

// check tells whether the claims are those of the identity.
func check(c claims, isDaemon bool) error {
	switch {
	case c.OID == "" || c.OID != c.Subject:
		return fmt.Errorf("oid is %q, sub %q", c.OID, c.Subject)
	case (c.AppID == daemon) != isDaemon:
		return fmt.Errorf("appid is %q", c.AppID)
	case isDaemon && c.Roles != nil || !isDaemon && fmt.Sprint(c.Roles) != "[consumer]":
		return fmt.Errorf("roles is %v", c.Roles)
	}
	return nil
}

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	failed := false
	for _, client := range clients {
		tok, err := client.token(ctx)
		for _, verify := range []func(context.Context, string) (claims, error){withOIDC, withKeyfunc} {
			var c claims
			if err == nil {
				c, err = verify(ctx, tok)
			}
			if err == nil {
				err = check(c, client.daemon)
			}
		}
		if err != nil {
			failed = true
			fmt.Printf("FAIL %s: %v\n", client.name, err)
			continue
		}
		fmt.Println("ok  ", client.name)
	}
	if failed {
		fmt.Fprintln(os.Stderr, "not all clients got a token that is right")
		os.Exit(1)
	}
}
