package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/aztoso/mitoken"
	"github.com/aztoso/mitoken/imdsfake"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestDemo(t *testing.T) {
	var out bytes.Buffer
	if err := run(t.Context(), []string{"-demo"}, &out); err != nil {
		t.Fatal(err, out.String())
	}
	var statuses []string
	for _, line := range strings.Split(out.String(), "\n") {
		if _, rest, ok := strings.Cut(line, "the daemon calls the service: "); ok {
			statuses = append(statuses, rest[:3])
		}
	}
	if fmt.Sprint(statuses) != "[403 403 200]" || strings.Count(out.String(), "already") != 1 {
		t.Errorf("it said %s", out.String())
	}
}

// newTenant is one with an administrator, a reader, and somebody who is neither.
func newTenant(t *testing.T) *imdsfake.Handler {
	t.Helper()
	roles, err := imdsfake.ParseManifest(manifest)
	if err != nil {
		t.Fatal(err)
	}
	off := imdsfake.AppRole{Value: "off", AllowedMemberTypes: []string{"Application"}}
	return &imdsfake.Handler{
		Identities: []imdsfake.Identity{
			{Name: "admin", ClientID: adminID}, {Name: "reader", ClientID: "reader"}, {Name: "daemon", ClientID: daemonID},
		},
		Apps: []imdsfake.App{{URI: resource, DisplayName: "My app", Roles: append(roles, off)}, {URI: "api://it's", DisplayName: "daemon"}},
		Assignments: []imdsfake.Assignment{
			{Identity: "admin", Resource: graph, Role: "Application.Read.All"},
			{Identity: "admin", Resource: graph, Role: "AppRoleAssignment.ReadWrite.All"},
			{Identity: "reader", Resource: graph, Role: "Directory.Read.All"},
		},
	}
}

func TestProvision(t *testing.T) {
	for _, tc := range []struct {
		name                     string
		as                       string
		resource, role, identity string
		want                     string // in what it says, or in the error
	}{
		{"by client ID", adminID, resource, "consumer", daemonID, "has the app role consumer of My app now"},
		{"with a slash", adminID, resource + "/", "consumer", daemonID, "now"},
		{"by name", adminID, resource, "consumer", "reader", "now"},
		{"no such service", adminID, "https://other", "consumer", daemonID, "no service principal is called https://other: has the service been registered"},
		{"a quote in a name", adminID, "api://o'clock", "consumer", daemonID, "no service principal is called api://o'clock"},
		{"no such role", adminID, resource, "admin", daemonID, `My app declares no app role "admin": it has ["consumer" "off"]`},
		{"a role that is off", adminID, resource, "off", daemonID, `"off" of My app is not enabled`},
		{"no such identity", adminID, resource, "consumer", "nobody", `no identity "nobody" is in this tenant`},
		{"no such ID", adminID, resource, "consumer", "00000000-0000-4000-8000-00000000dead", "is in this tenant"},
		{"two of a name", adminID, resource, "consumer", "daemon", `2 service principals are called "daemon"`},
		{"who may not assign", "reader", resource, "consumer", daemonID, "403 Authorization_RequestDenied: Insufficient privileges to complete the operation.; whoever runs this needs the application permissions"},
		{"who may not look", daemonID, resource, "consumer", daemonID, "Application.Read.All and AppRoleAssignment.ReadWrite.All"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fake := newTenant(t)
			cred := &mitoken.Credential{ID: azidentity.ClientID(tc.as), IMDSTransport: fake}
			defer cred.Close()
			d := newDirectory(cred, fake)
			var out bytes.Buffer
			err := d.provision(t.Context(), &out, tc.resource, tc.role, tc.identity)
			if got := out.String() + fmt.Sprint(err); !strings.Contains(got, tc.want) || strings.Contains(tc.want, "now") != (err == nil) {
				t.Errorf("got %s, want %s", got, tc.want)
			}
			if err != nil {
				return
			}
			out.Reset()
			if err := d.provision(t.Context(), &out, tc.resource, tc.role, tc.identity); err != nil || !strings.Contains(out.String(), "already") {
				t.Errorf("again: %s %v", out.String(), err)
			}
			if got := fake.Directory().Assignments; len(got) != 4 {
				t.Errorf("the directory has %v", got)
			}
		})
	}
}

// roundTripper answers as it likes.
type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// Pages are followed, on Microsoft Graph only; somebody else may be faster; and what
// is no JSON is an error.
func TestGraphIsOdd(t *testing.T) {
	answer := func(status int, body string) (*http.Response, error) {
		return &http.Response{StatusCode: status, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body))}, nil
	}
	id, app, r := &principal{ID: "i"}, &principal{ID: "s"}, role{ID: "r"}
	for _, tc := range []struct {
		name   string
		answer func(*http.Request) (*http.Response, error)
		isNew  bool
		want   string
	}{
		{"on the second page", func(req *http.Request) (*http.Response, error) {
			if req.URL.RawQuery == "" {
				return answer(200, `{"value":[],"@odata.nextLink":"`+graph+`/v1.0/x?page=2"}`)
			}
			return answer(200, `{"value":[{"resourceId":"S","appRoleId":"R"}]}`)
		}, false, ""},
		{"somebody was faster", func(req *http.Request) (*http.Response, error) {
			if req.Method == "GET" {
				return answer(200, `{"value":[]}`)
			}
			return answer(400, `{"error":{"code":"Request_BadRequest","message":"Permission being assigned already exists on the object"}}`)
		}, false, ""},
		{"a page elsewhere", func(req *http.Request) (*http.Response, error) {
			return answer(200, `{"value":[],"@odata.nextLink":"https://evil.example/"}`)
		}, false, "invalid"},
		{"no JSON", func(req *http.Request) (*http.Response, error) { return answer(200, "<") }, false, "invalid character"},
		{"an outage", func(req *http.Request) (*http.Response, error) { return answer(503, "<") }, false, "Microsoft Graph answered 503"},
		{"its token is no good", func(req *http.Request) (*http.Response, error) { return answer(401, "") }, false, "takes tokens for https://graph.microsoft.com only"},
	} {
		d := &directory{base: graph, client: &http.Client{Transport: roundTripper(func(req *http.Request) (*http.Response, error) {
			if req.URL.Host != "graph.microsoft.com" {
				return nil, errors.New("invalid host " + req.URL.Host)
			}
			return tc.answer(req)
		})}}
		isNew, err := d.assign(t.Context(), id, app, r)
		if isNew != tc.isNew || (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: got %v, %v", tc.name, isNew, err)
		}
	}
}

func TestMistakes(t *testing.T) {
	for want, args := range map[string][]string{
		"argument too many":     {"x"},
		"-identity is missing":  nil,
		"flag provided but not": {"-x"},
	} {
		if err := run(t.Context(), args, io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %s", args, err, want)
		}
	}
	if err := run(t.Context(), []string{"-h"}, io.Discard); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("got %v", err)
	}
}

// register.sh may be run again. The Azure CLI is played by a script that keeps what
// it is told in files, and fails for what it is not asked in this way.
func TestRegister(t *testing.T) {
	if _, err := exec.LookPath("bash"); err != nil {
		t.Skip("register.sh needs bash")
	}
	dir := t.TempDir()
	az := `#!/bin/sh
state=` + dir + `
case "$*" in
"ad app list --filter identifierUris/any(u:u eq 'https://myapp.aztoso.com') --query [0].appId -o tsv") cat $state/app 2>/dev/null ;;
"ad app create --display-name My app --identifier-uris https://myapp.aztoso.com --app-roles @manifest.json --query appId -o tsv")
	test -f manifest.json && echo app-1 | tee $state/app ;;
"ad sp list --filter appId eq 'app-1' --query [0].id -o tsv") cat $state/sp 2>/dev/null ;;
"ad sp create --id app-1 --query id -o tsv") echo sp-1 | tee $state/sp ;;
"ad app show --id app-1 --query appRoles[?value=='consumer'].id | [0] -o tsv") echo role-1 ;;
"ad app show --id app-1 --query appRoles[?value=='admin'].id | [0] -o tsv") ;;
"rest --method GET --uri https://graph.microsoft.com/v1.0/servicePrincipals/identity-1/appRoleAssignments --query value[?resourceId=='sp-1' && appRoleId=='role-1'].id | [0] -o tsv")
	cat $state/assigned 2>/dev/null ;;
"rest --method POST --uri https://graph.microsoft.com/v1.0/servicePrincipals/identity-1/appRoleAssignedTo --headers Content-Type=application/json --body {\"principalId\": \"identity-1\", \"resourceId\": \"sp-1\", \"appRoleId\": \"role-1\"} -o none")
	echo assignment-1 > $state/assigned ;;
*) echo "unexpected: az $*" >&2; exit 1 ;;
esac
true
`
	if err := os.WriteFile(filepath.Join(dir, "az"), []byte(az), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	register := func(role string) (string, error) {
		out, err := exec.Command("bash", "register.sh", resource, "My app", role, "identity-1").CombinedOutput()
		return string(out), err
	}
	if out, err := register("consumer"); err != nil || !strings.Contains(out, "registered https://myapp.aztoso.com as app-1\nmade the service principal sp-1\nassigned consumer to identity-1") {
		t.Errorf("got %s, %v", out, err)
	}
	if out, err := register("consumer"); err != nil || !strings.Contains(out, "is registered as app-1\nits service principal is sp-1\nidentity-1 has consumer already") {
		t.Errorf("again: %s, %v", out, err)
	}
	if out, err := register("admin"); err == nil || !strings.Contains(out, "declares no app role admin") {
		t.Errorf("another role: %s, %v", out, err)
	}
	if out, err := exec.Command("bash", "register.sh").CombinedOutput(); err == nil || !strings.Contains(string(out), "usage:") {
		t.Errorf("without arguments: %s, %v", out, err)
	}
}
