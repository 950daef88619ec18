// Azuresdk runs a client of the Azure SDK on a mitoken.Credential, in the place of
// one of azidentity's: azsecrets, which reads secrets from Key Vault.
//
// It brings a metadata service and a vault of its own, and takes the first away to
// show what the client makes of that: nothing.
//
//	go run .
//
// On a host with a managed identity that may read a vault:
//
//	go run . -vault https://myvault.vault.azure.net -secret mysecret
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azsecrets"
	"github.com/aztoso/mitoken"
	"github.com/aztoso/mitoken/imdsfake"
)

func main() {
	err := run(context.Background(), os.Args[1:], os.Stdout)
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "azuresdk:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out io.Writer) error {
	flags := flag.NewFlagSet("azuresdk", flag.ContinueOnError)
	flags.SetOutput(out)
	vault := flags.String("vault", "", "`URL` of a vault; one of its own if empty")
	name := flags.String("secret", "greeting", "`name` of the secret to read")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *vault == "" {
		return demo(ctx, *name, out)
	}
	var cred mitoken.Credential // this host's managed identity
	defer cred.Close()
	client, err := azsecrets.NewClient(*vault, &cred, nil)
	if err != nil {
		return err
	}
	return read(ctx, client, *name, out)
}

// read reads a secret. What it says is how long it is.
func read(ctx context.Context, client *azsecrets.Client, name string, out io.Writer) error {
	secret, err := client.GetSecret(ctx, name, "", nil)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "the secret %s has %d characters\n", secret.ID.Name(), len(*secret.Value))
	return nil
}

// demo reads a secret of a vault of its own, before an outage of the metadata
// service, and in it.
func demo(ctx context.Context, name string, out io.Writer) error {
	azure := imdsfake.NewServer(&imdsfake.Handler{
		Identities: []imdsfake.Identity{{Name: "daemon", SystemAssigned: true}},
		Apps:       []imdsfake.App{{URI: "https://vault.azure.net"}},
	})
	defer azure.Close()
	vault := newVault(azure.Handler, map[string]string{"greeting": "hello, world"})
	defer vault.Close()

	cred := &mitoken.Credential{Endpoint: azure.URL}
	defer cred.Close()
	options := &azsecrets.ClientOptions{DisableChallengeResourceVerification: true} // the vault is at 127.0.0.1
	options.Transport = vault.Client()
	client, err := azsecrets.NewClient(vault.URL, cred, options)
	if err != nil {
		return err
	}
	if err := read(ctx, client, name, out); err != nil {
		return err
	}
	azure.Handler.Inject(imdsfake.Fault{Failure: imdsfake.Refuse})
	fmt.Fprintln(out, "the metadata service is down")
	if err := read(ctx, client, name, out); err != nil {
		return err
	}
	fmt.Fprintf(out, "this would go on for %v\n", cred.TokenSource("https://vault.azure.net").Status().Survives.Round(1e9))
	return nil
}
