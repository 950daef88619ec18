package imdsfake_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aztoso/mitoken"
	"github.com/aztoso/mitoken/imdsfake"
)

const graph = "https://graph.microsoft.com"

// newGraph is the tenant of the article before its third step, with an
// administrator on the same host, and its client of Microsoft Graph.
func newGraph(t *testing.T) (*imdsfake.Handler, *http.Client) {
	fake := newTenant(t)
	fake.Identities = append(fake.Identities, imdsfake.Identity{Name: "admin", ClientID: "ad000000-0000-4000-8000-000000000001"})
	fake.Assignments = []imdsfake.Assignment{
		{Identity: "admin", Resource: graph, Role: "AppRoleAssignment.ReadWrite.All"},
		{Identity: "admin", Resource: graph, Role: "Application.Read.All"},
	}
	fake.Cache = imdsfake.NoCache
	return fake, graphClient(t, fake, "ad000000-0000-4000-8000-000000000001")
}

// graphClient calls Microsoft Graph as an identity.
func graphClient(t *testing.T, fake *imdsfake.Handler, clientID string) *http.Client {
	token := func() string {
		_, a := get(t, fake, "api-version=2018-02-01&resource="+url.QueryEscape(graph)+"&client_id="+clientID)
		return a["access_token"]
	}
	return &http.Client{Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
		if r.Header.Get("Authorization") == "" {
			r.Header.Set("Authorization", "Bearer "+token())
		}
		return fake.RoundTrip(r)
	})}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// call makes a call of Microsoft Graph, and returns the answer, decoded.
func call(t *testing.T, client *http.Client, method, path, body string, change ...func(*http.Request)) (int, map[string]any) {
	t.Helper()
	req, err := http.NewRequest(method, graph+"/v1.0/"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	for _, c := range change {
		c(req)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	var a map[string]any
	if err := json.Unmarshal(text, &a); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return resp.StatusCode, a
}

// one returns the only element of an answer's value.
func one(t *testing.T, a map[string]any) map[string]any {
	t.Helper()
	list, _ := a["value"].([]any)
	if len(list) != 1 {
		t.Fatalf("%d elements, want one: %v", len(list), a)
	}
	return list[0].(map[string]any)
}

// TestGraph is the article's third step: find the service by its App ID URI, the
// role by its value, the identity, and assign the one to the other.
func TestGraph(t *testing.T) {
	fake, client := newGraph(t)
	_, a := call(t, client, "GET", "servicePrincipals?$filter="+
		url.QueryEscape("servicePrincipalNames/any(n:n eq '"+resource+"')"), "")
	service := one(t, a)
	role := service["appRoles"].([]any)[0].(map[string]any)
	if role["value"] != "consumer" || service["servicePrincipalType"] != "Application" {
		t.Fatalf("the service is %v", service)
	}
	_, a = call(t, client, "GET", "servicePrincipals?$filter="+url.QueryEscape("appId eq '"+daemonClientID+"'"), "")
	daemon := one(t, a)
	if daemon["id"] != daemonObjectID || daemon["servicePrincipalType"] != "ManagedIdentity" || fmt.Sprint(daemon["alternativeNames"]) != "[isExplicit=True "+daemonPath+"]" {
		t.Fatalf("the daemon is %v", daemon)
	}
	body := fmt.Sprintf(`{"principalId": %q, "resourceId": %q, "appRoleId": %q}`, daemon["id"], service["id"], role["id"])
	// The article has the identity in the path; the documents, the service.
	status, a := call(t, client, "POST", "servicePrincipals/"+daemonObjectID+"/appRoleAssignedTo", body)
	if status != 201 || a["principalId"] != daemonObjectID || a["resourceId"] != service["id"] || a["appRoleId"] != role["id"] {
		t.Errorf("got %d %v", status, a)
	}
	status, a = call(t, client, "POST", fmt.Sprintf("servicePrincipals/%v/appRoleAssignedTo", service["id"]), body)
	if status != 400 || !strings.Contains(fmt.Sprint(a), "Permission being assigned already exists on the object") {
		t.Errorf("again: %d %v", status, a)
	}
	_, a = call(t, client, "GET", fmt.Sprintf("servicePrincipals/%v/appRoleAssignedTo", service["id"]), "")
	if got := one(t, a); got["principalDisplayName"] != "daemon" || got["appRoleId"] != role["id"] {
		t.Errorf("assigned at the service: %v", got)
	}
	_, a = call(t, client, "GET", "servicePrincipals/"+daemonObjectID+"/appRoleAssignments", "")
	if got := one(t, a); got["resourceDisplayName"] != resource {
		t.Errorf("assigned to the daemon: %v", got)
	}
	_, tok := get(t, fake, plain+"&client_id="+daemonClientID)
	if roles := verify(t, fake, fake.Issuer(), tok["access_token"], resource)["roles"]; fmt.Sprint(roles) != "[consumer]" {
		t.Errorf("the next token has the roles %v", roles)
	}
	if got := fake.Directory().Assignments; len(got) != 3 || got[2] != (imdsfake.Assignment{Identity: "daemon", Resource: resource, Role: "consumer"}) {
		t.Errorf("the directory has %v", got)
	}
}

func TestGraphRefuses(t *testing.T) {
	fake, client := newGraph(t)
	dir := fake.Directory()
	app, ms := dir.Apps[0], dir.Apps[1]
	post := "servicePrincipals/" + daemonObjectID + "/appRoleAssignedTo"
	body := func(principal, resource, role string) string {
		return fmt.Sprintf(`{"principalId": %q, "resourceId": %q, "appRoleId": %q}`, principal, resource, role)
	}
	const nobody = "00000000-0000-4000-8000-00000000dead"
	_, other := get(t, fake, plain)
	abroad := &imdsfake.Handler{Tenant: "22222222-2222-4333-8444-555555555555"} // which signs with the same key
	_, foreign := get(t, abroad, "api-version=2018-02-01&resource="+url.QueryEscape(graph))
	with := func(value string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set("Authorization", value) }
	}
	for _, tc := range []struct {
		name         string
		method, path string
		body         string
		change       func(*http.Request)
		status       int
		code, text   string
	}{
		{"no token", "GET", "servicePrincipals", "", with("Basic x"), 401, "InvalidAuthenticationToken", "Access token is empty."},
		{"not a token", "GET", "servicePrincipals", "", with("Bearer x"), 401, "InvalidAuthenticationToken", "Invalid JWT access token."},
		{"for somebody else", "GET", "servicePrincipals", "", with("Bearer " + other["access_token"]), 401, "InvalidAuthenticationToken", "Invalid audience"},
		{"of another tenant", "GET", "servicePrincipals", "", with("Bearer " + foreign["access_token"]), 401, "InvalidAuthenticationToken", "Invalid JWT access token."},
		{"a filter that is not understood", "GET", "servicePrincipals?$filter=startswith(displayName,'a')", "", nil, 400, "Request_UnsupportedQuery", "startswith"},
		{"an option that is not known", "GET", "servicePrincipals?$fliter=x", "", nil, 400, "BadRequest", "$fliter"},
		{"a query that is none", "GET", "servicePrincipals?$filter=displayName eq 'a;b'", "", nil, 400, "BadRequest", "semicolon"},
		{"not an ID", "GET", "servicePrincipals/me", "", nil, 400, "Request_BadRequest", "Invalid object identifier 'me'"},
		{"nobody's ID", "GET", "servicePrincipals/" + nobody, "", nil, 404, "Request_ResourceNotFound", nobody},
		{"nobody's application ID", "GET", "servicePrincipals(appId='" + nobody + "')", "", nil, 404, "Request_ResourceNotFound", nobody},
		{"another collection", "GET", "servicePrincipals/" + daemonObjectID + "/owners", "", nil, 400, "BadRequest", "'owners'"},
		{"nothing", "POST", post, "", func(r *http.Request) { r.Body, r.ContentLength = nil, 0 }, 400, "BadRequest", "Unable to read JSON"},
		{"no JSON", "POST", post, "<", nil, 400, "BadRequest", "Unable to read JSON"},
		{"a third one's path", "POST", "servicePrincipals/" + ms.ObjectID + "/appRoleAssignedTo", body(daemonObjectID, app.ObjectID, app.Roles[0].ID), nil, 400, "Request_BadRequest", "neither principalId nor"},
		{"no such service", "POST", post, body(daemonObjectID, nobody, app.Roles[0].ID), nil, 404, "Request_ResourceNotFound", nobody},
		{"no such identity", "POST", "servicePrincipals/" + app.ObjectID + "/appRoleAssignedTo", body(nobody, app.ObjectID, app.Roles[0].ID), nil, 404, "Request_ResourceNotFound", nobody},
		{"a service to itself", "POST", "servicePrincipals/" + app.ObjectID + "/appRoleAssignedTo", body(app.ObjectID, app.ObjectID, app.Roles[0].ID), nil, 400, "Request_BadRequest", "that of a client"},
		{"no such role", "POST", post, body(daemonObjectID, app.ObjectID, nobody), nil, 400, "Request_BadRequest", "was not found on application '" + app.ClientID},
		{"default access where there are roles", "POST", post, body(daemonObjectID, app.ObjectID, "00000000-0000-0000-0000-000000000000"), nil, 400, "Request_BadRequest", "was not found"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.change == nil {
				tc.change = func(*http.Request) {}
			}
			status, a := call(t, client, tc.method, tc.path, tc.body, tc.change)
			e, _ := a["error"].(map[string]any)
			if status != tc.status || e["code"] != tc.code || !strings.Contains(fmt.Sprint(e["message"]), tc.text) || e["innerError"] == nil {
				t.Errorf("got %d %v, want %d %s %s", status, a, tc.status, tc.code, tc.text)
			}
		})
	}
	// Who may read may not assign, and who has no role may do neither.
	fake.Assign(imdsfake.Assignment{Identity: "host", Resource: graph, Role: "Directory.Read.All"})
	reader := graphClient(t, fake, dir.Identities[0].ClientID)
	if status, _ := call(t, reader, "GET", "servicePrincipals", ""); status != 200 {
		t.Errorf("the reader got %d", status)
	}
	for name, c := range map[string]*http.Client{"the reader": reader, "the daemon": graphClient(t, fake, daemonClientID)} {
		status, a := call(t, c, "POST", post, body(daemonObjectID, app.ObjectID, app.Roles[0].ID))
		if status != 403 || !strings.Contains(fmt.Sprint(a), "Authorization_RequestDenied") {
			t.Errorf("%s got %d %v", name, status, a)
		}
	}
}

func TestGraphFinds(t *testing.T) {
	fake, client := newGraph(t)
	fake.Apps = append(fake.Apps, imdsfake.App{URI: "api://o'clock"})
	for path, want := range map[string]string{
		"servicePrincipals?$filter=" + url.QueryEscape("servicePrincipalNames/any(n:n eq 'api://o''clock')"):                        "api://o'clock",
		"servicePrincipals?$filter=" + url.QueryEscape("displayName eq 'Microsoft Graph'"):                                          "Microsoft Graph",
		"servicePrincipals?$filter=" + url.QueryEscape("id eq '"+daemonObjectID+"'"):                                                "daemon",
		"servicePrincipals(appId='00000003-0000-0000-c000-000000000000')":                                                           "Microsoft Graph",
		"servicePrincipals/" + strings.ToUpper(daemonObjectID):                                                                      "daemon",
		"servicePrincipals?$filter=" + url.QueryEscape("appId eq '"+daemonClientID+"'"):                                             "daemon",
		"servicePrincipals?$filter=" + url.QueryEscape("servicePrincipalNames/any(x: x eq 'a0000000-0000-4000-8000-000000000001')"): resource,
	} {
		status, a := call(t, client, "GET", path, "")
		if a["value"] != nil {
			a = one(t, a)
		}
		if status != 200 || a["displayName"] != want {
			t.Errorf("%s: got %d %v, want %s", path, status, a, want)
		}
	}
	if _, a := call(t, client, "GET", "servicePrincipals", ""); len(a["value"].([]any)) != 6 {
		t.Errorf("%d service principals, want 3 identities and 3 apps", len(a["value"].([]any)))
	}
}

// Default access is for apps that declare no roles.
func TestGraphDefaultAccess(t *testing.T) {
	fake, client := newGraph(t)
	fake.Apps = append(fake.Apps, imdsfake.App{URI: "api://plain", AssignmentRequired: true})
	query := "api-version=2018-02-01&resource=" + url.QueryEscape("api://plain")
	resp, a := get(t, fake, query)
	if resp.StatusCode != 400 || a["error"] != "invalid_grant" || !strings.Contains(a["error_description"], "AADSTS501051") {
		t.Errorf("without an assignment: %s %v", resp.Status, a)
	}
	dir := fake.Directory()
	host := dir.Identities[0].ObjectID
	status, made := call(t, client, "POST", "servicePrincipals/"+host+"/appRoleAssignments",
		fmt.Sprintf(`{"principalId": %q, "resourceId": %q, "appRoleId": "00000000-0000-0000-0000-000000000000"}`, host, dir.Apps[1].ObjectID))
	if status != 201 || made["appRoleId"] != "00000000-0000-0000-0000-000000000000" {
		t.Fatalf("got %d %v", status, made)
	}
	if resp, a := get(t, fake, query); resp.StatusCode != 200 {
		t.Errorf("with it: %s %v", resp.Status, a)
	}
}

func TestGraphTokenExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fake, _ := newGraph(t)
		cred := &mitoken.Credential{IMDSTransport: fake}
		defer cred.Close()
		tok, err := cred.TokenSource(graph).Token()
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(24 * time.Hour)
		client := &http.Client{Transport: fake}
		status, a := call(t, client, "GET", "servicePrincipals", "", func(r *http.Request) { tok.SetAuthHeader(r) })
		if status != 401 || !strings.Contains(fmt.Sprint(a), "the token is expired") {
			t.Errorf("got %d %v", status, a)
		}
	})
}
