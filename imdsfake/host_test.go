package imdsfake_test

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	msal "github.com/AzureAD/microsoft-authentication-library-for-go/apps/managedidentity"
	"github.com/aztoso/mitoken/imdsfake"
)

// Real clients, which know nothing of this fake, get tokens from each host that it
// emulates.

const (
	hostClientID   = "b0000000-0000-4000-8000-000000000001"
	daemonClientID = "c0000000-0000-4000-8000-000000000001"
	daemonObjectID = "0b000000-0000-4000-8000-000000000001"
	daemonPath     = "/subscriptions/s/daemon"
)

// newHosts is a tenant where every resource is known: MSAL's cache is that of the
// process, so that each test needs one of its own.
func newHosts(t testing.TB) *imdsfake.Handler {
	fake := newTenant(t)
	fake.Identities[0].ClientID = hostClientID
	fake.Apps, fake.Assignments = nil, nil
	return fake
}

var resources atomic.Int64

func newResource() string { return fmt.Sprint("api://", resources.Add(1)) }

// arcKeys makes the one place where clients read the key files of Azure Arc.
func arcKeys(t *testing.T) {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("this is where Azure Arc has its keys on Linux")
	}
	const dir = "/var/opt/azcmagent/tokens"
	for _, d := range []string{filepath.Dir(dir), dir} {
		if os.Mkdir(d, 0o755) == nil {
			t.Cleanup(func() { os.Remove(d) })
		}
	}
	probe, err := os.CreateTemp(dir, "probe")
	if err != nil {
		t.Skip("clients read the keys of Azure Arc in a directory that cannot be written here: ", err)
	}
	probe.Close()
	os.Remove(probe.Name())
}

// clear unsets the variables by which clients know any host.
func clear(t *testing.T) {
	t.Helper()
	for _, name := range []string{"IDENTITY_ENDPOINT", "IDENTITY_HEADER", "IDENTITY_SERVER_THUMBPRINT", "IMDS_ENDPOINT",
		"MSI_ENDPOINT", "MSI_SECRET", "DEFAULT_IDENTITY_CLIENT_ID", "AZURE_POD_IDENTITY_AUTHORITY_HOST"} {
		t.Setenv(name, "")
	}
}

// A client gets tokens with an ID of azidentity's, or with none.
type client struct {
	name string
	new  func(*http.Client, azidentity.ManagedIDKind) (getToken, error)
}

type getToken func(ctx context.Context, resource string) (string, time.Time, error)

var clients = []client{
	{"azidentity", func(c *http.Client, id azidentity.ManagedIDKind) (getToken, error) {
		cred, err := azidentity.NewManagedIdentityCredential(&azidentity.ManagedIdentityCredentialOptions{
			ClientOptions: azcore.ClientOptions{Transport: c}, ID: id,
		})
		return func(ctx context.Context, resource string) (string, time.Time, error) {
			tok, err := cred.GetToken(ctx, policy.TokenRequestOptions{Scopes: []string{resource + "/.default"}})
			return tok.Token, tok.ExpiresOn, err
		}, err
	}},
	{"MSAL", func(c *http.Client, id azidentity.ManagedIDKind) (getToken, error) {
		var of msal.ID = msal.SystemAssigned()
		switch id := id.(type) {
		case azidentity.ClientID:
			of = msal.UserAssignedClientID(id)
		case azidentity.ObjectID:
			of = msal.UserAssignedObjectID(id)
		case azidentity.ResourceID:
			of = msal.UserAssignedResourceID(id)
		}
		client, err := msal.New(of, msal.WithHTTPClient(c))
		return func(ctx context.Context, resource string) (string, time.Time, error) {
			ar, err := client.AcquireToken(ctx, resource)
			return ar.AccessToken, ar.ExpiresOn, err
		}, err
	}},
}

var (
	none    azidentity.ManagedIDKind
	ofAll   = []azidentity.ManagedIDKind{none, azidentity.ClientID(daemonClientID), azidentity.ObjectID(daemonObjectID), azidentity.ResourceID(daemonPath)}
	ofNone  = ofAll[:1]
	ofFirst = ofAll[:2]
)

func TestHosts(t *testing.T) {
	for _, tc := range []struct {
		host imdsfake.Host
		ids  []azidentity.ManagedIDKind
	}{
		{imdsfake.IMDS, ofAll},
		{imdsfake.AppService, ofAll},
		{imdsfake.AzureML, ofFirst},
		{imdsfake.CloudShell, ofNone},
		{imdsfake.Arc, ofAll},
		{imdsfake.ServiceFabric, ofNone},
	} {
		t.Run(string(tc.host), func(t *testing.T) {
			clear(t)
			if tc.host == imdsfake.Arc {
				arcKeys(t)
			}
			srv := imdsfake.NewServer(newHosts(t))
			defer srv.Close()
			transport := srv.Client()
			if tc.host != imdsfake.IMDS { // those have an endpoint, and want no help
				for name, value := range srv.Env(tc.host) {
					t.Setenv(name, value)
				}
				plain := &http.Transport{}
				defer plain.CloseIdleConnections()
				transport = &http.Client{Transport: plain}
			}
			for _, client := range clients {
				for _, id := range tc.ids {
					t.Run(fmt.Sprint(client.name, " ", id), func(t *testing.T) {
						get, err := client.new(transport, id)
						if err != nil {
							t.Fatal(err)
						}
						resource := newResource()
						token, expiry, err := get(t.Context(), resource)
						if err != nil {
							t.Fatal(err)
						}
						claims := verify(t, srv.Handler, srv.Handler.Issuer(), token, resource)
						want := hostClientID
						if id != nil {
							want = daemonClientID
						}
						if claims["appid"] != want {
							t.Errorf("appid is %v, want %s", claims["appid"], want)
						}
						if exp := time.Unix(int64(claims["exp"].(float64)), 0); !expiry.Equal(exp) {
							t.Errorf("the client has an expiry of %v, the token of %v", expiry, exp)
						}
						requests := srv.Handler.Requests()
						if last := requests[len(requests)-3]; last.Host != tc.host || last.ClientID != want || last.Resource != resource {
							t.Errorf("the journal has %+v", last) // before discovery and keys
						}
					})
				}
			}
			client := clients[0]
			get, err := client.new(transport, nil)
			if err != nil {
				t.Fatal(err)
			}
			srv.Handler.Inject(imdsfake.Fault{Status: 400, Times: 2})
			if _, _, err := get(t.Context(), newResource()); err == nil {
				t.Error("a fault befell nobody")
			}
		})
	}
}

// Clients retry what their policies say, on each host. Time is simulated.
func TestRetries(t *testing.T) {
	for _, tc := range []struct {
		client   int
		host     imdsfake.Host
		status   int
		times    int
		requests int // in the end
		ok       bool
	}{
		{0, imdsfake.IMDS, 404, 3, 4, true},
		{0, imdsfake.IMDS, 410, 6, 7, true},
		{0, imdsfake.IMDS, 429, 100, 7, false},
		{0, imdsfake.IMDS, 400, 1, 1, false},
		{0, imdsfake.AppService, 503, 3, 4, true},
		{0, imdsfake.AppService, 404, 1, 1, false},
		{0, imdsfake.CloudShell, 500, 1, 2, true},
		{0, imdsfake.AzureML, 504, 2, 3, true},
		{1, imdsfake.IMDS, 404, 2, 3, true},
		{1, imdsfake.IMDS, 500, 100, 3, false},
		{1, imdsfake.AppService, 404, 1, 1, false},
		{1, imdsfake.AppService, 429, 2, 3, true},
	} {
		t.Run(fmt.Sprintf("%s on %s, %d of %d", clients[tc.client].name, tc.host, tc.times, tc.status), func(t *testing.T) {
			clear(t)
			fake := newHosts(t)
			for name, value := range fake.Env(tc.host, "http://127.0.0.1:1") {
				t.Setenv(name, value)
			}
			fake.Inject(imdsfake.Fault{Status: tc.status, Times: tc.times})
			synctest.Test(t, func(t *testing.T) {
				get, err := clients[tc.client].new(&http.Client{Transport: fake}, nil)
				if err != nil {
					t.Fatal(err)
				}
				if _, _, err := get(t.Context(), newResource()); (err == nil) != tc.ok {
					t.Errorf("got %v", err)
				}
				if got := len(fake.Requests()); got != tc.requests {
					t.Errorf("%d requests, want %d", got, tc.requests)
				}
			})
		})
	}
}

// DefaultAzureCredential first sends a request that is wrong, to see whether
// anybody is there.
func TestProbe(t *testing.T) {
	clear(t)
	t.Setenv("AZURE_TOKEN_CREDENTIALS", "ManagedIdentityCredential")
	fake := newHosts(t)
	cred, err := azidentity.NewDefaultAzureCredential(&azidentity.DefaultAzureCredentialOptions{
		ClientOptions: azcore.ClientOptions{Transport: &http.Client{Transport: fake}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cred.GetToken(t.Context(), policy.TokenRequestOptions{Scopes: []string{newResource()}}); err != nil {
		t.Error(err)
	}
	if last := fake.Requests()[len(fake.Requests())-1]; last.Status != 200 {
		t.Errorf("the last request is %+v", last)
	}
}

// newRequestTo is a request as all hosts want it.
func newRequestTo(method, target string) *http.Request {
	req, err := http.NewRequest(method, target, nil)
	if err != nil {
		panic(err)
	}
	req.Header.Set("Metadata", "true")
	return req
}

// getFrom asks a host for a token, as its clients do, and returns what they do
// not look at, too.
func getFrom(t *testing.T, fake *imdsfake.Handler, host imdsfake.Host, query string, change ...func(*http.Request)) (*http.Response, map[string]any) {
	t.Helper()
	env := fake.Env(host, "https://127.0.0.1:1")
	endpoint := env["IDENTITY_ENDPOINT"] + env["MSI_ENDPOINT"]
	if host == imdsfake.IMDS {
		endpoint = "http://169.254.169.254/metadata/identity/oauth2/token"
	}
	req := newRequestTo(http.MethodGet, endpoint+"?"+query)
	switch host {
	case imdsfake.AppService:
		req.Header.Set("X-IDENTITY-HEADER", env["IDENTITY_HEADER"])
	case imdsfake.AzureML:
		req.Header.Set("secret", env["MSI_SECRET"])
	case imdsfake.ServiceFabric:
		req.Header.Set("Secret", env["IDENTITY_HEADER"])
	case imdsfake.CloudShell:
		req.Method, req.URL.RawQuery = http.MethodPost, ""
		req.Body = io.NopCloser(strings.NewReader(query))
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	for _, c := range change {
		c(req)
	}
	resp, err := fake.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	var a map[string]any
	if err := json.NewDecoder(resp.Body).Decode(&a); err != nil {
		t.Fatal(err)
	}
	return resp, a
}

// arcKey reads the key that a challenge speaks of.
func arcKey(t *testing.T, resp *http.Response) func(*http.Request) {
	t.Helper()
	path, ok := strings.CutPrefix(resp.Header.Get("WWW-Authenticate"), "Basic realm=")
	if resp.StatusCode != 401 || !ok || filepath.Ext(path) != ".key" {
		t.Fatalf("it is no challenge: %s %v", resp.Status, resp.Header)
	}
	key, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return func(r *http.Request) { r.Header.Set("Authorization", "Basic "+string(key)) }
}

// Each host has its own shape of an answer, and of an expiry.
func TestShapes(t *testing.T) {
	for host, want := range map[imdsfake.Host]string{
		imdsfake.IMDS:          "access_token client_id expires_in=86400 expires_on=946771200 ext_expires_in=86400 not_before=946684800 resource=r token_type=Bearer",
		imdsfake.AppService:    "access_token client_id expires_on=946771200 not_before=946684800 resource=r token_type=Bearer",
		imdsfake.AzureML:       "access_token expires_on=01/02/2000 00:00:00 resource=r token_type=Bearer",
		imdsfake.CloudShell:    "access_token client_id expires_in=86400 expires_on=946771200 ext_expires_in=86400 not_before=946684800 resource=r token_type=Bearer",
		imdsfake.Arc:           "access_token client_id expires_in=86400 expires_on=946771200 ext_expires_in=86400 not_before=946684800 resource=r token_type=Bearer",
		imdsfake.ServiceFabric: "access_token expires_on=9.467712e+08 resource=r token_type=Bearer",
	} {
		t.Run(string(host), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fake := newHosts(t)
				fake.KeyDir = t.TempDir()
				query, change := goodQuery(host), []func(*http.Request){}
				if host == imdsfake.Arc {
					resp, _ := getFrom(t, fake, host, query)
					change = append(change, arcKey(t, resp))
				}
				resp, a := getFrom(t, fake, host, query, change...)
				var got []string
				for _, name := range []string{"access_token", "client_id", "expires_in", "expires_on", "ext_expires_in", "not_before", "resource", "token_type"} {
					value, ok := a[name]
					delete(a, name)
					switch {
					case !ok:
					case name == "access_token" || name == "client_id":
						got = append(got, name)
					default:
						got = append(got, fmt.Sprintf("%s=%v", name, value))
					}
				}
				if strings.Join(got, " ") != want || len(a) > 0 || resp.StatusCode != 200 {
					t.Errorf("got  %s %v\nwant %s", strings.Join(got, " "), a, want)
				}
			})
		})
	}
}

func goodQuery(host imdsfake.Host) string {
	version := map[imdsfake.Host]string{imdsfake.IMDS: "2018-02-01", imdsfake.AppService: "2019-08-01",
		imdsfake.AzureML: "2017-09-01", imdsfake.Arc: "2020-06-01", imdsfake.ServiceFabric: "2019-07-01-preview"}[host]
	if version == "" {
		return "resource=r"
	}
	return "api-version=" + version + "&resource=r"
}

// A client whose token was refused says so, and gets another one.
func TestRefusedTokens(t *testing.T) {
	for _, host := range []imdsfake.Host{imdsfake.AppService, imdsfake.ServiceFabric} {
		fake := newHosts(t)
		token := func(query string) string {
			_, a := getFrom(t, fake, host, goodQuery(host)+query)
			return fmt.Sprint(a["access_token"])
		}
		hash := func(token string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(token))) }
		first := token("&xms_cc=cp1")
		if token("&token_sha256_to_refresh="+hash("another")) != first {
			t.Errorf("%s: another token than the one that was refused is new", host)
		}
		next := token("&token_sha256_to_refresh=" + hash(first))
		if next == first || token("") != next {
			t.Errorf("%s: the refused token comes again", host)
		}
	}
}

// Each host has its own way to refuse.
func TestHostsRefuse(t *testing.T) {
	without := func(name string) func(*http.Request) { return func(r *http.Request) { r.Header.Del(name) } }
	with := func(name, value string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set(name, value) }
	}
	keep := func(*http.Request) {}
	for _, tc := range []struct {
		host   imdsfake.Host
		query  string
		change func(*http.Request)
		status int
		want   string // in the body, as JSON with sorted names
	}{
		{imdsfake.AppService, "", without("X-IDENTITY-HEADER"), 401, `{"message":"The X-IDENTITY-HEADER header is missing","statusCode":401}`},
		{imdsfake.AppService, "", with("X-IDENTITY-HEADER", "wrong"), 401, `not that of this host`},
		{imdsfake.AppService, "&client_id=nobody", keep, 400, `{"message":"No User Assigned or Delegated Managed Identity found for specified ClientId/ResourceId/PrincipalId.","statusCode":400}`},
		{imdsfake.AppService, "&msi_res_id=x", keep, 400, `\"msi_res_id\" is not known`},
		{imdsfake.AzureML, "&clientid=", keep, 200, `"expires_on"`},
		{imdsfake.AzureML, "&clientid=nobody", keep, 400, `"statusCode":400`},
		{imdsfake.AzureML, "&client_id=" + daemonClientID, keep, 400, `\"client_id\" is not known`},
		{imdsfake.AzureML, "", without("secret"), 401, `The secret header is missing`},
		{imdsfake.CloudShell, "", without("Metadata"), 400, `{"error":{"code":"BadRequest","message":"Required metadata header not specified"}}`},
		{imdsfake.CloudShell, "", with("Content-Type", "application/json"), 400, `application/x-www-form-urlencoded`},
		{imdsfake.CloudShell, "&client_id=x", keep, 400, `\"client_id\" is not known`},
		{imdsfake.CloudShell, "", func(r *http.Request) { r.Method = "GET" }, 405, `Only POST`},
		{imdsfake.CloudShell, "", func(r *http.Request) { r.Body = nil }, 400, `\"resource\" is missing`},
		{imdsfake.CloudShell, "", func(r *http.Request) { r.URL.RawQuery = "resource=r" }, 400, `malformed`},
		{imdsfake.Arc, "", without("Metadata"), 400, `"error":"bad_request_102"`},
		{imdsfake.Arc, "", with("Authorization", "Basic guessed"), 401, `"error":"unauthorized_client"`},
		{imdsfake.ServiceFabric, "", without("Secret"), 401, `"code":"SecretHeaderNotFound"`},
		{imdsfake.ServiceFabric, "", with("Secret", "x"), 401, `"code":"ManagedIdentityNotFound"`},
		{imdsfake.ServiceFabric, "", func(r *http.Request) { r.URL.Scheme = "http" }, 400, `over https only`},
		{imdsfake.ServiceFabric, "&client_id=x", keep, 400, `"code":"InternalServerError"`},
		{imdsfake.ServiceFabric, "", func(r *http.Request) { r.URL.RawQuery = "resource=r" }, 400, `"code":"InvalidApiVersion"`},
		{imdsfake.ServiceFabric, "", func(r *http.Request) { r.URL.RawQuery = "api-version=2019-07-01-preview" }, 400, `"code":"ArgumentNullOrEmpty"`},
	} {
		t.Run(fmt.Sprint(tc.host, " ", tc.want), func(t *testing.T) {
			fake := newHosts(t)
			fake.KeyDir = t.TempDir()
			resp, a := getFrom(t, fake, tc.host, goodQuery(tc.host)+tc.query, tc.change)
			body, _ := json.Marshal(a)
			if resp.StatusCode != tc.status || !strings.Contains(string(body), tc.want) {
				t.Errorf("got %s %s, want %d %s", resp.Status, body, tc.status, tc.want)
			}
		})
	}
}

func TestUnknownAudienceInCloudShell(t *testing.T) {
	resp, a := getFrom(t, newTenant(t), imdsfake.CloudShell, "resource="+url.QueryEscape("https://other"))
	if body := fmt.Sprint(a); resp.StatusCode != 400 || !strings.Contains(body, "AudienceNotSupported") {
		t.Errorf("got %s %s", resp.Status, body)
	}
}

// The key of Azure Arc is in a file, is good once, and the file goes then. Files
// that nobody uses go with Close, and the oldest ones before.
func TestArcKeys(t *testing.T) {
	fake := newHosts(t)
	fake.KeyDir = t.TempDir()
	files := func() int {
		found, err := os.ReadDir(fake.KeyDir)
		if err != nil {
			t.Fatal(err)
		}
		return len(found)
	}
	query := goodQuery(imdsfake.Arc)
	resp, _ := getFrom(t, fake, imdsfake.Arc, query)
	use := arcKey(t, resp)
	if resp, a := getFrom(t, fake, imdsfake.Arc, query+"&client_id="+daemonClientID, use); resp.StatusCode != 200 || a["client_id"] != daemonClientID {
		t.Errorf("with the key: %s %v", resp.Status, a)
	}
	if resp, _ := getFrom(t, fake, imdsfake.Arc, query, use); resp.StatusCode != 401 || files() != 0 {
		t.Errorf("again: %s, and %d files", resp.Status, files())
	}
	for range 25 {
		getFrom(t, fake, imdsfake.Arc, query)
	}
	if files() != 20 {
		t.Errorf("%d files, want 20", files())
	}
	fake.Close()
	if files() != 0 {
		t.Errorf("%d files after Close", files())
	}
	gone := newHosts(t)
	gone.KeyDir = filepath.Join(fake.KeyDir, "nowhere")
	if resp, a := getFrom(t, gone, imdsfake.Arc, query); resp.StatusCode != 500 || !strings.Contains(fmt.Sprint(a), "KeyDir") {
		t.Errorf("with no directory: %s %v", resp.Status, a)
	}
}

func TestEnvOfNoHost(t *testing.T) {
	defer func() {
		if p := fmt.Sprint(recover()); !strings.Contains(p, `no host "Mars"`) {
			t.Errorf("panic %q", p)
		}
	}()
	new(imdsfake.Handler).Env("Mars", "")
}
