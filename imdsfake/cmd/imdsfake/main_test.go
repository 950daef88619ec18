package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A process is the program, running.
type process struct {
	t     *testing.T
	said  string // until the line to try
	base  string
	stop  context.CancelFunc
	ended chan error
}

// start runs the program until it has said what to try.
func start(t *testing.T, args ...string) *process {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	p := &process{t: t, stop: cancel, ended: make(chan error, 1)}
	r, w := io.Pipe()
	go func() {
		p.ended <- run(ctx, append([]string{"-addr", "127.0.0.1:0"}, args...), w)
		w.Close()
	}()
	t.Cleanup(p.end)
	for lines := bufio.NewScanner(r); lines.Scan(); {
		p.said += lines.Text() + "\n"
		if strings.HasPrefix(lines.Text(), "curl ") {
			break
		}
	}
	p.base = regexp.MustCompile(`http://127\.0\.0\.1:\d+`).FindString(p.said)
	return p
}

// end stops the program as a signal does.
func (p *process) end() {
	p.stop()
	if err := <-p.ended; err != nil {
		p.t.Errorf("it ended with %v", err)
	}
	p.ended <- nil // for who asks again
	http.DefaultClient.CloseIdleConnections()
}

// do sends a request, and returns the status and the body.
func (p *process) do(method, path, body string, header ...string) (int, string) {
	p.t.Helper()
	req, err := http.NewRequest(method, p.base+path, strings.NewReader(body))
	if err != nil {
		p.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

// token asks for one, and returns the status.
func (p *process) token() int {
	p.t.Helper()
	status, _ := p.do("GET", "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https%3A%2F%2Fmyapp.aztoso.com", "", "Metadata", "true")
	return status
}

// The line that it says to try works, and it says what there is.
func TestServe(t *testing.T) {
	p := start(t, "-manifest", "testdata/manifest.json")
	for _, want := range []string{"consumer", "https://myapp.aztoso.com", "client_id=da000000", "/discovery/keys",
		"IDENTITY_ENDPOINT=" + p.base + "/appservice/msi/token", "MSI_SECRET=", "Service Fabric  see -tls"} {
		if !strings.Contains(p.said, want) {
			t.Errorf("it does not say %q:\n%s", want, p.said)
		}
	}
	_, target, _ := strings.Cut(p.said, "curl -s -H Metadata:true '"+p.base)
	status, body := p.do("GET", strings.TrimSuffix(target, "'\n"), "", "Metadata", "true")
	if status != 200 || !strings.Contains(body, "access_token") {
		t.Errorf("got %d %s", status, body)
	}
}

// It serves https where it is told to, and what it says of Service Fabric is so.
func TestServeTLS(t *testing.T) {
	p := start(t, "-tls", "127.0.0.1:0")
	for _, name := range []string{"MSI_ENDPOINT", "IMDS_ENDPOINT"} {
		t.Setenv(name, "")
	}
	for _, name := range []string{"IDENTITY_HEADER", "IDENTITY_SERVER_THUMBPRINT", "IDENTITY_ENDPOINT"} {
		matches := regexp.MustCompile(name+`=(\S+)`).FindAllStringSubmatch(p.said, -1)
		t.Setenv(name, matches[len(matches)-1][1]) // Service Fabric is the last one
	}
	if !strings.HasPrefix(os.Getenv("IDENTITY_ENDPOINT"), "https://") {
		t.Fatal(p.said)
	}
	plain := &http.Transport{}
	defer plain.CloseIdleConnections()
	o := &azidentity.ManagedIdentityCredentialOptions{}
	o.Transport = &http.Client{Transport: plain}
	cred, err := azidentity.NewManagedIdentityCredential(o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cred.GetToken(t.Context(), policy.TokenRequestOptions{Scopes: []string{"https://myapp.aztoso.com"}}); err != nil {
		t.Error(err)
	}
}

// A request that hangs does not keep it from ending.
func TestEndsWhileARequestHangs(t *testing.T) {
	p := start(t)
	if status, body := p.do("POST", "/imdsfake/faults", `{"failure": "hang"}`); status != 204 {
		t.Fatal(status, body)
	}
	hung := make(chan error)
	go func() {
		req, _ := http.NewRequest("GET", p.base+"/metadata/identity/oauth2/token", nil)
		resp, err := http.DefaultClient.Do(req)
		if err == nil {
			resp.Body.Close()
		}
		hung <- err
	}()
	if status, body := p.do("GET", "/imdsfake/requests?atLeast=1", ""); status != 200 || !strings.Contains(body, `"hang"`) {
		t.Errorf("got %d %s", status, body)
	}
	p.end()
	if err := <-hung; err == nil {
		t.Error("there was an answer")
	}
}

// The example of a configuration file has every key that there is.
func TestExample(t *testing.T) {
	p := start(t, "-config", "testdata/imdsfake.yaml", "-tls", "127.0.0.1:0", "-cache", "none")
	for _, want := range []string{"app       api://orders, which declares reader", "IDENTITY_HEADER=the-same-each-time",
		"it has AppRoleAssignment.ReadWrite.All at https://graph.microsoft.com",
		"principal worker, with the client ID 50000000-0000-4000-8000-000000000001; it has consumer",
		"AZURE_AUTHORITY_HOST=https://127.0.0.1:"} {
		if !strings.Contains(p.said, want) {
			t.Errorf("it does not say %q:\n%s", want, p.said)
		}
	}
	if got := []int{p.token(), p.token()}; got[0] != 429 || got[1] != 200 {
		t.Errorf("the faults are not those of the file: %v", got)
	}
	if _, page := p.do("GET", "/", ""); !strings.Contains(page, "worker") || strings.Contains(page, "not-a-secret") {
		t.Error("the page has no service principal, or its secret")
	}
	text, err := os.ReadFile("testdata/imdsfake.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range keysOf(t) {
		if !regexp.MustCompile(`\b` + key + `:`).Match(text) {
			t.Errorf("the example has no %s", key)
		}
	}
}

// keysOf returns the keys that a file can have at the top.
func keysOf(t *testing.T) []string {
	t.Helper()
	text, err := json.Marshal(config{})
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]any
	if err := json.Unmarshal(text, &fields); err != nil {
		t.Fatal(err)
	}
	var keys []string
	for key := range fields {
		keys = append(keys, key)
	}
	if len(keys) < 12 {
		t.Fatalf("there are only %v", keys)
	}
	return keys
}

// JSON is as good as YAML.
func TestJSON(t *testing.T) {
	c, err := parseConfig([]byte(`{"lifetime": "1h", "limits": {"perSecond": 3}, "faults": [{"for": "1m", "status": 503, "header": {"X": "y"}}]}`), "")
	if err != nil {
		t.Fatal(err)
	}
	if c.Lifetime != time.Hour || c.Limits.PerSecond != 3 || c.Faults[0].For != time.Minute || c.Faults[0].Header["X"] != "y" {
		t.Errorf("got %+v", c)
	}
}

// A mistake in a file is one line, which names the place.
func TestMistakesInFiles(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "bad.json"), []byte(`[{"value":""}]`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ text, want string }{
		{"tenant: contoso", `1:9: tenant: "contoso" is not a GUID`},
		{"tenat: x", `1:1: unknown field "tenat"`},
		{"lifetime: 24", `1:11: lifetime: "24" is no duration, such as 30s or 12h`},
		{"lifetime: 1ms", `1:11: lifetime: 1ms is less than a second`},
		{"cache: sometimes", `1:8: cache: "sometimes" is none of`},
		{"limits: {perSecond: -1}", `1:9: limits: {PerSecond:-1`},
		{"limits: {perMinute: 1}", `1:10: unknown field "perMinute"`},
		{"identities:\n  - name: a\n    systemAssigned: yes please", `3:21: cannot unmarshal string`},
		{"identities:\n- name: a\n- name: a", `3:7: identities[1]: the name "a"`},
		{"identities:\n- name: a\n  clientId: x\n- name: b\n  clientId: x", `5:13: identities[1]: clientId: x is that of "a", too`},
		{"apps:\n- manifest: nowhere.json", `2:13: apps[0]: manifest: open`},
		{"apps:\n- manifest: bad.json", `2:13: apps[0]: manifest: imdsfake: manifest: app role 0: value is empty`},
		{"apps:\n- manifest: bad.json\n  roles: [{value: a}]", `2:13: apps[0]: manifest: the app has roles, too`},
		{"apps:\n- uri: api://a\n  roles:\n  - value: a b\n    allowedMemberTypes: [User]", `4:10: apps[0]: roles[0]: value "a b" has a space`},
		{"apps:\n- uri: api://a\nassignments:\n- {identity: x, resource: api://a}", `4:14: assignments[0]: identity: there is no identity "x"`},
		{"servicePrincipals:\n- certificate: nowhere.pem", `2:16: servicePrincipals[0]: certificate: open`},
		{"servicePrincipals:\n- certificate: bad.json", `2:16: servicePrincipals[0]: certificate: the file has no certificate`},
		{"servicePrincipals:\n- name: host\nidentities:\n- name: host", `2:9: servicePrincipals[0]: name: host is that of "host", too`},
		{"faults:\n- status: 99", `2:11: faults[0]: status: 99`},
		{"faults:\n- {failure: explode}", `2:13: faults[0]: failure: "explode"`},
		{"faults:\n- {for: soon}", `2:9: for: "soon" is no duration`},
		{"faults: !0 000", ` the YAML cannot be understood`},
		{"apps:\n- uri: \"a\\nb\"\n- uri: \"a\\nb\"", `3:8: apps[1]: uri: a b is that of another app`},
		{"apps:\n- uri: api://a\n  clientId: c\n- uri: api://b\n  clientId: c", `5:13: apps[1]: clientId: c is that of api://a, too`},
		{"apps:\n- uri: api://a\n  clientId: 00000003-0000-0000-c000-000000000000\nfaults: [{}]", `4:10: faults[0]: it has no effect`},
		{"lifetime: 0", `1:11: lifetime: "0" is no duration`},
		{"tenant: [", `1:9: `},
		{"tenant: a\ntenant: b", `2:1: mapping key "tenant" already defined`},
		{"- a", `1:1: `},
		{"lifetime: 1h\n---\nlifetime: 2h", ` there is more than one document`},
		{"{\"faults\": [{\"for\": 99}]}", `1:21: for: "99" is no duration`},
	} {
		t.Run(tc.want, func(t *testing.T) {
			_, err := parseConfig([]byte(tc.text), dir)
			if err == nil || !strings.HasPrefix(err.Error(), tc.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got  %v\nwant %s", err, tc.want)
			}
		})
	}
	for _, good := range []string{"", "# nothing\n", "lifetime: &l 1h", "lifetime: !!str 1h", "faults:\n- {status: 503, header: {for: x}}",
		"faults:\n- {fields: {for: ever, lifetime: 1}, times: 1}"} {
		if _, err := parseConfig([]byte(good), dir); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
}

func TestMistakes(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "bad.yaml")
	if err := os.WriteFile(bad, []byte("lifetime: 1h\ntenat: x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for want, args := range map[string][]string{
		"argument too many":          {"x"},
		"less than a second":         {"-lifetime", "1ms"},
		"invalid value":              {"-lifetime", "long"},
		"no such file":               {"-manifest", "nowhere.json"},
		"nowhere.yaml: no such file": {"-config", "nowhere.yaml"},
		bad + `:2:1: unknown field`:  {"-config", bad},
		"-app and -manifest are for": {"-config", "testdata/imdsfake.yaml", "-app", "api://a"},
		"manifest: ":                 {"-manifest", "testdata/imdsfake.yaml"},
		"see -addr":                  {"-addr", "127.0.0.1:99999"},
		"see -tls":                   {"-addr", "127.0.0.1:0", "-tls", "127.0.0.1:99999"},
		"flag provided but not":      {"-x"},
		`cache: "x" is none of`:      {"-cache", "x"},
	} {
		if err := run(t.Context(), args, io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", args, err, want)
		}
	}
	var help bytes.Buffer
	if err := run(t.Context(), []string{"-h"}, &help); !errors.Is(err, flag.ErrHelp) || !strings.Contains(help.String(), "-config file") {
		t.Errorf("got %v, %s", err, help.String())
	}
}

func FuzzParseConfig(f *testing.F) {
	text, err := os.ReadFile("testdata/imdsfake.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"faults": [{"for": "1m"}]}`))
	f.Add([]byte("faults: &a\n- *a"))
	f.Add([]byte("faults: !0 000"))
	f.Add([]byte("apps: !list\n  uri: api://a"))
	f.Add([]byte("identities: !a\n0 *a"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parseConfig(data, "testdata")
		if err != nil {
			return
		}
		if err := c.handler().Check(); err != nil {
			t.Error(err)
		}
		c.handler().Inject(c.Faults...) // or it panics
	})
}
