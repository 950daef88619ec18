package imdsfake_test

import (
	"crypto/tls"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptrace"
	"strings"
	"testing"
	"time"

	"github.com/aztoso/mitoken/imdsfake"
	"github.com/coreos/go-oidc/v3/oidc"
)

func TestServerHidesNothing(t *testing.T) {
	srv := imdsfake.NewServer(newTenant(t))
	defer srv.Close()
	for _, path := range []string{"/common/discovery/keys", "/" + imdsfake.DefaultTenant + "/discovery/keys"} {
		resp, err := srv.Client().Get(srv.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != 200 || !strings.Contains(string(text), `"kid"`) || strings.Contains(string(text), `"d"`) {
			t.Errorf("%s: %s %s", path, resp.Status, text)
		}
	}
	resp, err := srv.Client().Get("http://login.microsoftonline.com/" + imdsfake.DefaultTenant + "/.well-known/openid-configuration")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var meta map[string]any
	if err := json.NewDecoder(resp.Body).Decode(&meta); err != nil {
		t.Fatal(err)
	}
	if meta["issuer"] != srv.Handler.Issuer() || meta["jwks_uri"] != "http://login.microsoftonline.com/"+imdsfake.DefaultTenant+"/discovery/keys" {
		t.Errorf("the metadata is %v", meta)
	}
}

// Close does not wait for those that hang.
func TestCloseReleasesWhatHangs(t *testing.T) {
	srv := imdsfake.NewServer(nil)
	srv.Handler.Inject(imdsfake.Fault{Failure: imdsfake.Hang})
	sent, failed := make(chan bool, 1), make(chan error, 1)
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
		WroteRequest: func(httptrace.WroteRequestInfo) { sent <- true },
	})
	go func() {
		_, err := srv.Client().Do(newRequest(plain).WithContext(ctx))
		failed <- err
	}()
	<-sent
	srv.Close()
	if err := <-failed; err == nil {
		t.Error("there was an answer")
	}
}

// Over https, the Server's client takes it for Entra and for Microsoft Graph, and
// checks the certificate as ever; others must be told to trust it.
func TestTLS(t *testing.T) {
	srv := imdsfake.NewServer(nil)
	defer srv.Close()
	ctx := oidc.ClientContext(t.Context(), srv.Client())
	if _, err := oidc.NewProvider(ctx, "https://login.microsoftonline.com/"+imdsfake.DefaultTenant+"/v2.0"); err != nil {
		t.Error(err)
	}
	if _, err := srv.Client().Get("https://example.com/"); err == nil || !strings.Contains(err.Error(), "certificate is valid for") {
		t.Errorf("another name: %v", err)
	}
	if first, again := srv.TLSURL(), srv.TLSURL(); !strings.HasPrefix(first, "https://127.0.0.1:") || again != first {
		t.Errorf("it is at %s, and then at %s", first, again)
	}
	other := &http.Transport{}
	defer other.CloseIdleConnections()
	if _, err := other.RoundTrip(newRequestTo("GET", srv.TLSURL())); err == nil {
		t.Error("a stranger trusts it")
	}
}

// Faults break connections over https, too.
func TestResetOverTLS(t *testing.T) {
	srv := imdsfake.NewServer(nil)
	defer srv.Close()
	srv.Handler.Inject(imdsfake.Fault{Failure: imdsfake.Reset, Times: 1}, imdsfake.Fault{Failure: imdsfake.ResetBody})
	tr := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}
	for range 2 {
		if resp, err := tr.RoundTrip(newRequestTo("GET", srv.TLSURL()+"/metadata/identity/oauth2/token?"+plain)); err == nil {
			if _, err := io.ReadAll(resp.Body); err == nil {
				t.Error("there was an answer")
			}
		}
	}
}

func TestServerNeedsAHandlerThatMakesSense(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	imdsfake.NewServer(&imdsfake.Handler{Lifetime: time.Millisecond})
}
