package mitoken

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/aztoso/mitoken/imdsfake"
	"github.com/golang-jwt/jwt/v5"
)

const (
	daemonID   = "da000000-0000-4000-8000-000000000001"
	daemonOID  = "0a000000-0000-4000-8000-000000000001"
	daemonPath = "/subscriptions/s/daemon"
	workerID   = "50000000-0000-4000-8000-000000000001"
	worker     = "system:serviceaccount:default:worker"
)

// hostEnv are the variables by which any kind of host is known.
var hostEnv = []string{"IDENTITY_ENDPOINT", "IDENTITY_HEADER", "IDENTITY_SERVER_THUMBPRINT", "IMDS_ENDPOINT", "MSI_ENDPOINT",
	"MSI_SECRET", "DEFAULT_IDENTITY_CLIENT_ID", "AZURE_FEDERATED_TOKEN_FILE", "AZURE_CLIENT_ID", "AZURE_TENANT_ID",
	"AZURE_CLIENT_SECRET", "AZURE_AUTHORITY_HOST", "AZURE_TOKEN_CREDENTIALS"}

// setEnv makes the environment that of a host.
func setEnv(t *testing.T, env map[string]string) {
	t.Helper()
	for _, name := range hostEnv {
		t.Setenv(name, env[name])
		if env[name] == "" {
			os.Unsetenv(name) // until the end of the test
		}
	}
}

// newHostFake has a host's identity, a user-assigned one, and a service principal.
// Resources are not known in advance: MSAL's cache is that of the process, so that
// each test has one of its own.
func newHostFake() *imdsfake.Handler {
	return &imdsfake.Handler{
		Identities: []imdsfake.Identity{
			{Name: "host", SystemAssigned: true},
			{Name: "daemon", ClientID: daemonID, ObjectID: daemonOID, ResourceID: daemonPath},
		},
		ServicePrincipals: []imdsfake.ServicePrincipal{{Name: "worker", ClientID: workerID, Subject: worker, Secret: "s"}},
		Lifetime:          day,
		Cache:             imdsfake.NoCache,
	}
}

var resourcesMade atomic.Int64

func newResource() string { return fmt.Sprint("api://host/", resourcesMade.Add(1)) }

// A hostTest is a host as a program on it sees it.
type hostTest struct {
	source string
	ids    []azidentity.ManagedIDKind
	env    func(*testing.T, *imdsfake.Handler) map[string]string
	lost   time.Duration // how long the worst outage is that nobody feels
}

var (
	onlyDefault = []azidentity.ManagedIDKind{nil}
	byClientID  = append(onlyDefault, azidentity.ManagedIDKind(azidentity.ClientID(daemonID)))
	byAny       = append(byClientID[:2:2], azidentity.ObjectID(daemonOID), azidentity.ResourceID(daemonPath))
)

var hostTests = []hostTest{
	{"appservice", byAny, managed(imdsfake.AppService), day / 2},
	{"azureml", byClientID, managed(imdsfake.AzureML), day / 2},
	{"cloudshell", onlyDefault, managed(imdsfake.CloudShell), day / 2},
	{"azurearc", byAny, func(t *testing.T, fake *imdsfake.Handler) map[string]string {
		arcKeyDir(t)
		return managed(imdsfake.Arc)(t, fake)
	}, day / 2},
	{"servicefabric", onlyDefault, func(_ *testing.T, fake *imdsfake.Handler) map[string]string {
		return fake.Env(imdsfake.ServiceFabric, "https://127.0.0.1:1")
	}, day / 2},
	{"workloadidentity", onlyDefault, workloadEnv, day / 2},
}

func managed(h imdsfake.Host) func(*testing.T, *imdsfake.Handler) map[string]string {
	return func(_ *testing.T, fake *imdsfake.Handler) map[string]string { return fake.Env(h, "http://127.0.0.1:1") }
}

// arcKeyDir makes the one place where azidentity reads the keys of Azure Arc.
func arcKeyDir(t *testing.T) {
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
		t.Skip("azidentity reads the keys of Azure Arc in a directory that cannot be written here: ", err)
	}
	probe.Close()
	os.Remove(probe.Name())
}

// workloadEnv is what the webhook of AKS sets, with a token of Kubernetes.
func workloadEnv(t *testing.T, fake *imdsfake.Handler) map[string]string {
	t.Helper()
	token, err := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims{"sub": worker, "aud": "api://AzureADTokenExchange", "exp": 4_000_000_000}).SignedString([]byte("cluster"))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	return map[string]string{"AZURE_FEDERATED_TOKEN_FILE": file, "AZURE_CLIENT_ID": workerID, "AZURE_TENANT_ID": imdsfake.DefaultTenant}
}

// pipes is a listener whose connections are in memory, so that it works in a
// bubble.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { close(p.closed); return nil }
func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

func (p *pipes) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case p.conns <- server:
		return client, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// transportTo leads to a fake: straight, or over connections and TLS, on which
// Service Fabric's clients insist. What it returns ends it.
func transportTo(fake *imdsfake.Handler, source string) (*http.Client, func()) {
	if source != "servicefabric" {
		return &http.Client{Transport: fake}, func() {}
	}
	p := &pipes{make(chan net.Conn), make(chan struct{})}
	server := &http.Server{Handler: fake, TLSConfig: &tls.Config{Certificates: []tls.Certificate{fake.Certificate()}}}
	go server.ServeTLS(p, "", "")
	return &http.Client{Transport: &http.Transport{DialContext: p.dial, DisableKeepAlives: true}}, func() {
		server.Close()
		time.Sleep(time.Minute) // TLS has a deadline for its farewells, which nobody reads
	}
}

// hour is when a request was made, in hours of a simulation.
func hours(begin, at time.Time) float64 { return at.Sub(begin).Hours() }

// TestHosts is each kind of host that has another service than IMDS: the first
// token, a refresh when 40 to 50 % of its life are over, though MSAL would keep it
// for 23 h 56 min, and an outage of half its life.
func TestHosts(t *testing.T) {
	for _, tc := range hostTests {
		t.Run(tc.source, func(t *testing.T) {
			fake := newHostFake()
			setEnv(t, tc.env(t, fake))
			synctest.Test(t, func(t *testing.T) {
				transport, end := transportTo(fake, tc.source)
				defer end()
				cred := &Credential{transport: transport}
				defer cred.Close()
				src := cred.TokenSource(newResource())
				begin := time.Now()
				first, err := src.Token()
				if err != nil {
					t.Fatal(err)
				}
				if got := src.Status(); got.Source != tc.source || got.State != "fresh" || got.Expiry.Sub(begin) != day {
					t.Errorf("the status is %+v", got)
				}
				for range 12 * 12 {
					time.Sleep(5 * time.Minute)
					if _, err := src.Token(); err != nil {
						t.Fatal(err)
					}
				}
				issued := fake.Tokens()
				if len(issued) != 2 || hours(begin, issued[1].Issued) < 9.6 || hours(begin, issued[1].Issued) > 12.001 {
					t.Fatalf("tokens were issued %v", issued)
				}
				if tok, _ := src.Token(); tok == first {
					t.Error("the first token is still in use")
				}
				fake.Inject(imdsfake.Fault{Status: 503, For: tc.lost})
				for range int(tc.lost / (5 * time.Minute)) {
					time.Sleep(5 * time.Minute)
					if _, err := src.Token(); err != nil {
						t.Fatalf("%v into the outage: %v", time.Since(begin)-day/2, err)
					}
				}
				time.Sleep(16 * time.Minute)
				if got := src.Status(); got.State != "fresh" || got.Failures != 0 {
					t.Errorf("after the outage: %+v", got)
				}
			})
		})
	}
}

// Whose token it is can be selected, on hosts that have more than one.
func TestHostsHaveIdentities(t *testing.T) {
	for _, tc := range hostTests {
		for _, id := range byAny {
			if tc.source == "workloadidentity" {
				continue // see TestWorkloadIdentity
			}
			t.Run(fmt.Sprint(tc.source, " ", id), func(t *testing.T) {
				fake := newHostFake()
				setEnv(t, tc.env(t, fake))
				synctest.Test(t, func(t *testing.T) {
					transport, end := transportTo(fake, tc.source)
					defer end()
					cred := &Credential{ID: id, transport: transport}
					defer cred.Close()
					_, err := cred.TokenSource(newResource()).Token()
					known := false
					for _, k := range tc.ids {
						known = known || k == id
					}
					if known != (err == nil) || err != nil && !strings.Contains(err.Error(), "the environment is that of "+tc.source) {
						t.Fatalf("got %v", err)
					}
					if err == nil && (fake.Tokens()[0].ClientID == daemonID) != (id != nil) {
						t.Errorf("the token is for %s", fake.Tokens()[0].ClientID)
					}
				})
			})
		}
	}
}

func TestWorkloadIdentity(t *testing.T) {
	fake := newHostFake()
	env := workloadEnv(t, fake)
	for _, tc := range []struct {
		name string
		id   azidentity.ManagedIDKind
		env  string // AZURE_CLIENT_ID
		want string // of the error
	}{
		{"that of the environment", nil, workerID, ""},
		{"that of ID", azidentity.ClientID(workerID), "somebody", ""},
		{"an object ID", azidentity.ObjectID("o"), workerID, "azidentity.ClientID only, not by azidentity.ObjectID"},
		{"an unknown one", azidentity.ClientID("nobody"), workerID, "AADSTS700016"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			env["AZURE_CLIENT_ID"] = tc.env
			setEnv(t, env)
			synctest.Test(t, func(t *testing.T) {
				cred := &Credential{ID: tc.id, transport: &http.Client{Transport: fake}}
				defer cred.Close()
				_, err := cred.TokenSource(newResource()).Token()
				if (err == nil) != (tc.want == "") || err != nil && (!strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n")) {
					t.Errorf("got %v", err)
				}
			})
		})
	}
	// A token file that is not there is an error of the token, not of the choice.
	env["AZURE_FEDERATED_TOKEN_FILE"] = filepath.Join(t.TempDir(), "gone")
	setEnv(t, env)
	cred := &Credential{transport: &http.Client{Transport: fake}}
	defer cred.Close()
	if _, err := cred.TokenSource(newResource()).Token(); err == nil || !strings.Contains(err.Error(), "gone") {
		t.Errorf("got %v", err)
	}
}

// TestHostIsDetected is which environment makes which host.
func TestHostIsDetected(t *testing.T) {
	const (
		endpoint, header = "IDENTITY_ENDPOINT", "IDENTITY_HEADER"
		file, client     = "AZURE_FEDERATED_TOKEN_FILE", "AZURE_CLIENT_ID"
		url              = "http://127.0.0.1:1/"
		print            = "0123456789012345678901234567890123456789"
	)
	workload := map[string]string{file: "f", client: workerID, "AZURE_TENANT_ID": imdsfake.DefaultTenant}
	with := func(base map[string]string, more ...string) map[string]string {
		env := map[string]string{}
		for k, v := range base {
			env[k] = v
		}
		for i := 0; i < len(more); i += 2 {
			env[more[i]] = more[i+1]
		}
		return env
	}
	for _, tc := range []struct {
		name string
		env  map[string]string
		want string
	}{
		{"nothing", nil, "imds"},
		{"App Service", with(nil, endpoint, url, header, "h"), "appservice"},
		{"App Service with a workload identity", with(workload, endpoint, url, header, "h"), "appservice"},
		{"an endpoint alone", with(nil, endpoint, url), "imds"},
		{"Service Fabric", with(nil, endpoint, "https://127.0.0.1:1/", header, "h", "IDENTITY_SERVER_THUMBPRINT", print), "servicefabric"},
		{"Service Fabric over http", with(nil, endpoint, url, header, "h", "IDENTITY_SERVER_THUMBPRINT", print), "none"},
		{"Azure ML", with(nil, "MSI_ENDPOINT", url, "MSI_SECRET", "s"), "azureml"},
		{"Cloud Shell", with(nil, "MSI_ENDPOINT", url), "cloudshell"},
		{"Cloud Shell with a workload identity", with(workload, "MSI_ENDPOINT", url), "cloudshell"},
		{"Arc", with(nil, endpoint, url, "IMDS_ENDPOINT", url), "azurearc"},
		{"AKS", workload, "workloadidentity"},
		{"AKS without a file", with(workload, file, ""), "imds"},
		{"AKS without a client", with(workload, client, ""), "imds"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			setEnv(t, tc.env)
			var cred Credential
			defer cred.Close()
			src := cred.TokenSource("api://detected")
			if got := src.Status(); got.Source != tc.want || got.State != "empty" {
				t.Errorf("the status is %+v, want %s", got, tc.want)
			}
			setEnv(t, map[string]string{"MSI_ENDPOINT": url, "MSI_SECRET": "s"})
			if got := src.Status().Source; got != tc.want {
				t.Errorf("the environment changed, and so did the host: %s", got)
			}
			// Who has an endpoint or a transport for IMDS means it.
			setEnv(t, tc.env)
			for _, cred := range []*Credential{{Endpoint: "http://127.0.0.1:1"}, {IMDSTransport: http.DefaultTransport}} {
				if got := cred.TokenSource("r").Status().Source; got != "imds" {
					t.Errorf("%+v: %s", cred, got)
				}
				cred.Close()
			}
		})
	}
	// The choice is of the first token, not of the making of a source.
	setEnv(t, nil)
	var cred Credential
	defer cred.Close()
	src := cred.TokenSource("api://late")
	setEnv(t, workload)
	if got := src.Status().Source; got != "workloadidentity" {
		t.Errorf("source is %s", got)
	}
}

// What a host says when it refuses is in the error, on one line.
func TestHostsRefuse(t *testing.T) {
	for _, tc := range hostTests {
		for _, r := range []struct {
			fault imdsfake.Fault
			want  string
		}{
			{imdsfake.Fault{Times: 1, Latency: 1}, "The resource principal named"},
			{imdsfake.Fault{Status: 429}, "429"},
			{imdsfake.Fault{Failure: imdsfake.Reset}, "ManagedIdentityCredential: "},
			{imdsfake.Fault{Status: 200, Body: "<html>"}, ""},
		} {
			t.Run(tc.source+" "+r.want, func(t *testing.T) {
				fake := newHostFake()
				fake.Apps = []imdsfake.App{{URI: "api://known"}}
				setEnv(t, tc.env(t, fake))
				synctest.Test(t, func(t *testing.T) {
					transport, end := transportTo(fake, tc.source)
					defer end()
					cred := &Credential{transport: transport}
					defer cred.Close()
					fake.Inject(r.fault)
					_, err := cred.TokenSource(newResource()).Token()
					want := strings.Replace(r.want, "ManagedIdentity", map[bool]string{true: "WorkloadIdentity", false: "ManagedIdentity"}[tc.source == workloadName], 1)
					if err == nil || !strings.Contains(err.Error(), tc.source+": ") || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
						t.Errorf("got %v, want %q in it", err, want)
					}
				})
			})
		}
	}
}

// A host that cannot be used says why, each time, and asks nobody.
func TestHostThatCannotBe(t *testing.T) {
	setEnv(t, map[string]string{"IDENTITY_ENDPOINT": "http://127.0.0.1:1/", "IDENTITY_HEADER": "h",
		"IDENTITY_SERVER_THUMBPRINT": "short"})
	synctest.Test(t, func(t *testing.T) {
		var cred Credential
		defer cred.Close()
		for range 3 {
			_, err := cred.TokenSource("r").Token()
			if err == nil || !strings.Contains(err.Error(), "the environment is that of servicefabric") || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v", err)
			}
			time.Sleep(10 * time.Second)
		}
	})
}

// The services of hosts are on the host: no proxy is asked for them, which azcore's
// own transport would do. The processes of this test have an endpoint whose name no
// resolver looks for, so that only a proxy could be asked for it.
func TestHostsTakeNoProxy(t *testing.T) {
	const endpoint = "http://app..service/msi/token"
	switch os.Getenv("MITOKEN_TEST_PROXY") {
	case "ours":
		var cred Credential
		defer cred.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := cred.TokenSource("r").TokenContext(ctx); err == nil {
			t.Error("there is a token")
		}
		return
	case "azcore's":
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, _ = must(azidentity.NewManagedIdentityCredential(nil)).GetToken(ctx, tokenOptions{Scopes: []string{"r"}})
		return
	}
	var asked atomic.Int64
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		w.Header().Set("Connection", "close") // azcore keeps its connections
		w.WriteHeader(http.StatusForbidden)
	}))
	defer proxy.Close()
	for whose, want := range map[string]bool{"ours": false, "azcore's": true} {
		asked.Store(0)
		cmd := exec.Command(os.Args[0], "-test.run=^TestHostsTakeNoProxy$")
		cmd.Env = append(os.Environ(), "MITOKEN_TEST_PROXY="+whose, "HTTP_PROXY="+proxy.URL, "http_proxy="+proxy.URL,
			"NO_PROXY=", "no_proxy=", "IDENTITY_ENDPOINT="+endpoint, "IDENTITY_HEADER=h", "IDENTITY_SERVER_THUMBPRINT=")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", whose, err, out)
		}
		if got := asked.Load() > 0; got != want {
			t.Errorf("%s: the proxy was asked: %v, want %v", whose, got, want)
		}
	}
}

// Secrets and certificates prove who a program is anywhere; what they get is
// refreshed by our schedule, through MSAL's cache.
func TestServicePrincipals(t *testing.T) {
	setEnv(t, nil)
	for _, lifetime := range []time.Duration{time.Hour, day} {
		fake := newHostFake()
		fake.Lifetime = lifetime
		options := azcore.ClientOptions{Transport: &http.Client{Transport: fake}}
		for name, upstream := range servicePrincipals(t, fake, options) {
			t.Run(fmt.Sprint(name, " ", lifetime), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					cred := &Credential{Upstream: upstream}
					defer cred.Close()
					resource := newResource()
					src := cred.TokenSource(resource)
					begin := time.Now()
					for range 200 {
						if _, err := src.Token(); err != nil {
							t.Fatal(err)
						}
						time.Sleep(lifetime / 100)
					}
					var last time.Duration
					n := 0
					for _, tok := range fake.Tokens() {
						if tok.Resource != resource {
							continue
						}
						at := tok.Issued.Sub(begin)
						if part := float64(at-last) / float64(lifetime); n > 0 && (part < 0.39 || part > 0.51) {
							t.Errorf("token %d was issued when %.0f %% of the one before were over", n, 100*part)
						}
						last = at
						n++
					}
					if n < 4 || n > 6 {
						t.Errorf("%d tokens in two lifetimes", n)
					}
				})
			})
		}
	}
}

// servicePrincipals are azidentity's credentials for one, alone and in chains.
func servicePrincipals(t *testing.T, fake *imdsfake.Handler, o azcore.ClientOptions) map[string]azcore.TokenCredential {
	t.Helper()
	cert, key := newCertificate(t)
	fake.ServicePrincipals[0].Certificate = cert
	secret := must(azidentity.NewClientSecretCredential(imdsfake.DefaultTenant, workerID, "s",
		&azidentity.ClientSecretCredentialOptions{ClientOptions: o}))
	file := workloadEnv(t, fake)["AZURE_FEDERATED_TOKEN_FILE"]
	t.Setenv("AZURE_CLIENT_ID", workerID)
	t.Setenv("AZURE_TENANT_ID", imdsfake.DefaultTenant)
	t.Setenv("AZURE_CLIENT_SECRET", "s")
	return map[string]azcore.TokenCredential{
		"secret": secret,
		"certificate": must(azidentity.NewClientCertificateCredential(imdsfake.DefaultTenant, workerID, certs(cert), key,
			&azidentity.ClientCertificateCredentialOptions{ClientOptions: o})),
		"workload identity": must(azidentity.NewWorkloadIdentityCredential(&azidentity.WorkloadIdentityCredentialOptions{
			ClientOptions: o, TokenFilePath: file})),
		"chain": must(azidentity.NewChainedTokenCredential([]azcore.TokenCredential{unavailable{}, secret}, nil)),
		"environment": must(azidentity.NewEnvironmentCredential(
			&azidentity.EnvironmentCredentialOptions{ClientOptions: o})),
		"default": must(azidentity.NewDefaultAzureCredential(
			&azidentity.DefaultAzureCredentialOptions{ClientOptions: o})),
	}
}

// unavailable is a credential that is not set up.
type unavailable struct{}

func (unavailable) GetToken(context.Context, tokenOptions) (azcore.AccessToken, error) {
	return azcore.AccessToken{}, azidentity.NewCredentialUnavailableError("not set up")
}

// TestWhatForcesARefresh pins, for each kind of credential, that its own cache
// hides the issuer from a plain request, and that what a delegate demands gets
// past it. If it fails after an update of azidentity, the schedule of this package
// no longer reaches the issuer.
func TestWhatForcesARefresh(t *testing.T) {
	setEnv(t, nil)
	fake := newHostFake()
	options := azcore.ClientOptions{Transport: &http.Client{Transport: fake}}
	kinds := servicePrincipals(t, fake, options)
	for _, h := range []imdsfake.Host{imdsfake.IMDS, imdsfake.AppService, imdsfake.AzureML, imdsfake.CloudShell} {
		t.Run("making "+string(h), func(t *testing.T) { // so that the environment is this one's alone
			setEnv(t, fake.Env(h, "http://127.0.0.1:1"))
			o := &azidentity.ManagedIdentityCredentialOptions{ClientOptions: options}
			kinds[string(h)] = must(azidentity.NewManagedIdentityCredential(o))
		})
	}
	for name, cred := range kinds {
		t.Run(name, func(t *testing.T) {
			if kind, ok := managedKinds[name]; ok {
				setEnv(t, fake.Env(kind, "http://127.0.0.1:1"))
			}
			synctest.Test(t, func(t *testing.T) {
				d := &delegate{credential: cred}
				resource := newResource()
				issue := func(r round) *token {
					t.Helper()
					tok, err := d.issue(t.Context(), resource, r)
					if err != nil {
						t.Fatal(err)
					}
					return tok
				}
				first := issue(round{})
				time.Sleep(time.Minute)
				if again := issue(round{}); again.value != first.value {
					t.Error("the credential has no cache: then what is demanded of it is superfluous")
				}
				forced := issue(round{held: first.expiry})
				if forced.value == first.value || !forced.expiry.After(first.expiry) {
					t.Error("the credential's cache keeps the schedule from the issuer")
				}
				if after := issue(round{}); after.value != forced.value {
					t.Error("the credential's cache does not take the new token")
				}
			})
		})
	}
}

var managedKinds = map[string]imdsfake.Host{string(imdsfake.IMDS): imdsfake.IMDS, string(imdsfake.AppService): imdsfake.AppService,
	string(imdsfake.AzureML): imdsfake.AzureML, string(imdsfake.CloudShell): imdsfake.CloudShell}

// TestRepeats has an issuer that gives out the same token until its end.
func TestRepeats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake := &imdsfake.Handler{} // which does, as documented
		cred := &Credential{IMDSTransport: fake}
		defer cred.Close()
		src := cred.TokenSource("r")
		if _, err := src.Token(); err != nil {
			t.Fatal(err)
		}
		if got := src.Status(); got.Repeats != 0 {
			t.Errorf("at first: %+v", got)
		}
		time.Sleep(20 * time.Hour)
		if got := src.Status(); got.Repeats < 20 || got.State != "due" || got.Failures != 0 {
			t.Errorf("after 20 hours: %+v", got)
		}
		time.Sleep(5 * time.Hour)
		if got := src.Status(); got.Repeats != 0 || got.State != "fresh" {
			t.Errorf("with the next one: %+v", got)
		}
	})
}
