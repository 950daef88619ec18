package imdsfake

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// This file is Microsoft Graph, as far as the assignment of app roles has to do
// with it: "Grant an appRoleAssignment for a service principal" (Microsoft) and
// what leads up to it. All service principals of the tenant are those of its
// identities and of its apps.

const graphPath = "/v1.0/servicePrincipals"

// The permissions that the calls want: app roles of Microsoft Graph.
const (
	readAll      = "Application.Read.All"
	readWriteAll = "Application.ReadWrite.All"
	directory    = "Directory.Read.All"
	assignAll    = "AppRoleAssignment.ReadWrite.All"
)

// graphApp is Microsoft Graph, with its IDs in all tenants but for the object ID.
var graphApp = App{
	URI:         "https://graph.microsoft.com",
	DisplayName: "Microsoft Graph",
	ClientID:    "00000003-0000-0000-c000-000000000000",
	Roles: []AppRole{
		graphRole("9a5d68dd-52b0-4cc2-bd40-abcf444ac30c", readAll),
		graphRole("1bfefb4e-e0b5-418b-a88f-73c46d2cc8e9", readWriteAll),
		graphRole("7ab1d382-f21e-4acd-a863-ba3e13f7da61", directory),
		graphRole("06b708a9-e830-4db3-a914-8e69da51d44f", assignAll),
	},
}

func graphRole(id, value string) AppRole {
	return AppRole{ID: id, Value: value, DisplayName: value, Description: value,
		AllowedMemberTypes: []string{"Application"}, IsEnabled: true}
}

// noRole is the ID of default access, for apps that declare no roles.
const noRole = "00000000-0000-0000-0000-000000000000"

// principal is a service principal.
type principal struct {
	identity *Identity // either this
	app      *App      // or this
}

// graph answers a request to Microsoft Graph.
func (h *Handler) graph(c *call) answer {
	if p := h.checkGraph(c); p != nil {
		return graphError(c, p)
	}
	rest := strings.TrimPrefix(c.URL.Path, graphPath)
	if p := checkOptions(c.URL.RawQuery); p != nil {
		return graphError(c, p)
	}
	if rest == "" && c.Method == http.MethodGet {
		return h.listPrincipals(c)
	}
	id, collection, _ := strings.Cut(strings.TrimPrefix(rest, "/"), "/")
	body := c.graphBody()
	h.mu.Lock()
	defer h.mu.Unlock()
	sp, p := h.principal(id, rest)
	if p != nil {
		return graphError(c, p)
	}
	switch c.Method + " " + collection {
	case "GET ":
		c.entry.Reason = "a service principal"
		return graphAnswer(c, http.StatusOK, "servicePrincipals/$entity", sp.fields())
	case "GET appRoleAssignedTo":
		return h.listAssignments(c, func(a assigned) bool { return a.app == sp.app })
	case "GET appRoleAssignments":
		return h.listAssignments(c, func(a assigned) bool { return a.identity.ObjectID == sp.id() })
	case "POST appRoleAssignedTo", "POST appRoleAssignments":
		return h.postAssignment(c, sp, body)
	}
	return graphError(c, &problem{status: 400, code: "BadRequest",
		text: "Resource not found for the segment '" + collection + "'."})
}

// checkOptions returns what is wrong with the options of a query (OData). $select
// and $top are taken, and make no difference.
func checkOptions(query string) *problem {
	options, err := url.ParseQuery(query)
	for name := range options {
		if name != "$filter" && name != "$select" && name != "$top" {
			err = errors.New(name)
		}
	}
	if err != nil {
		return &problem{status: 400, code: "BadRequest", text: "The query is not understood: " + err.Error()}
	}
	return nil
}

// checkGraph returns what is wrong with the token of a request.
func (h *Handler) checkGraph(c *call) *problem {
	deny := func(text string) *problem {
		return &problem{status: 401, code: "InvalidAuthenticationToken", text: text}
	}
	token, ok := strings.CutPrefix(c.Header.Get("Authorization"), "Bearer ")
	if !ok || token == "" {
		return deny("Access token is empty.")
	}
	claims, err := h.verify(token)
	switch {
	case errors.Is(err, jwt.ErrTokenExpired):
		return deny("Lifetime validation failed, the token is expired.")
	case err != nil:
		return deny("Invalid JWT access token.")
	}
	if audience, _ := claims["aud"].(string); !graphApp.is(audience) {
		return deny("Access token validation failure. Invalid audience.")
	}
	enough := []string{readAll, readWriteAll, directory}
	if c.Method != http.MethodGet {
		enough = []string{assignAll}
	}
	roles, _ := claims["roles"].([]any)
	if !slices.ContainsFunc(roles, func(r any) bool { s, _ := r.(string); return slices.Contains(enough, s) }) {
		return &problem{status: 403, code: "Authorization_RequestDenied",
			text: "Insufficient privileges to complete the operation."}
	}
	return nil
}

// principals returns all service principals.
func (h *Handler) principals() []principal {
	var all []principal
	for _, id := range h.tenant.principals() {
		all = append(all, principal{identity: &id})
	}
	for _, a := range h.tenant.apps {
		all = append(all, principal{app: a})
	}
	return all
}

var byAppID = regexp.MustCompile(`^\(appId='([^']*)'\)`)

// principal returns the service principal that a path names, by object ID or by
// application ID.
func (h *Handler) principal(id, path string) (principal, *problem) {
	appID := byAppID.FindStringSubmatch(path)
	for _, sp := range h.principals() {
		if strings.EqualFold(sp.id(), id) || appID != nil && strings.EqualFold(sp.appID(), appID[1]) {
			return sp, nil
		}
	}
	if appID == nil && !guidForm.MatchString(id) {
		return principal{}, &problem{status: 400, code: "Request_BadRequest",
			text: "Invalid object identifier '" + id + "'."}
	}
	return principal{}, &problem{status: 404, code: "Request_ResourceNotFound", text: "Resource '" + id +
		"' does not exist or one of its queried reference-property objects are not present."}
}

// filters are those that are understood, by what they compare.
var filters = []struct {
	form  *regexp.Regexp
	match func(principal, string) bool
}{
	{regexp.MustCompile(`^appId eq '((?:[^']|'')*)'$`), func(sp principal, v string) bool {
		return strings.EqualFold(sp.appID(), v)
	}},
	{regexp.MustCompile(`^id eq '((?:[^']|'')*)'$`), func(sp principal, v string) bool {
		return strings.EqualFold(sp.id(), v)
	}},
	{regexp.MustCompile(`^displayName eq '((?:[^']|'')*)'$`), func(sp principal, v string) bool {
		return strings.EqualFold(sp.name(), v)
	}},
	{regexp.MustCompile(`^servicePrincipalNames/any\(\s*(?:\w+)\s*:\s*(?:\w+) eq '((?:[^']|'')*)'\s*\)$`),
		func(sp principal, v string) bool { return slices.Contains(sp.names(), v) }},
}

// listPrincipals answers with the service principals that a filter lets through.
func (h *Handler) listPrincipals(c *call) answer {
	match := func(principal) bool { return true }
	if filter := c.URL.Query().Get("$filter"); filter != "" {
		match = nil
		for _, f := range filters {
			if v := f.form.FindStringSubmatch(filter); v != nil {
				value := strings.ReplaceAll(v[1], "''", "'") // OData's way to quote one
				match = func(sp principal) bool { return f.match(sp, value) }
			}
		}
		if match == nil {
			return graphError(c, &problem{status: 400, code: "Request_UnsupportedQuery",
				text: "Unsupported or invalid query filter clause specified: " + filter})
		}
	}
	list := []any{}
	for _, sp := range h.principals() {
		if match(sp) {
			list = append(list, sp.fields())
		}
	}
	c.entry.Reason = "service principals"
	return graphAnswer(c, http.StatusOK, "servicePrincipals", map[string]any{"value": list})
}

// listAssignments answers with assignments. h.mu is held.
func (h *Handler) listAssignments(c *call, match func(assigned) bool) answer {
	list := []any{}
	for _, a := range h.tenant.assignments {
		if match(a) {
			list = append(list, a.fields())
		}
	}
	c.entry.Reason = "app role assignments"
	return graphAnswer(c, http.StatusOK, "appRoleAssignments", map[string]any{"value": list})
}

// graphBody returns the body of a request, or what of it can be read: what is cut
// off is no JSON.
func (c *call) graphBody() []byte {
	if c.Body == nil {
		return nil
	}
	body, _ := io.ReadAll(io.LimitReader(c.Body, formLimit))
	return body
}

// postAssignment assigns an app role. h.mu is held.
func (h *Handler) postAssignment(c *call, sp principal, body []byte) answer {
	var asked struct{ PrincipalID, ResourceID, AppRoleID string }
	if json.Unmarshal(body, &asked) != nil {
		return graphError(c, &problem{status: 400, code: "BadRequest", text: "Unable to read JSON request payload. " +
			"Please ensure Content-Type header is set and payload is of valid JSON format."})
	}
	// The path may name either side: the documents do so with the app, people
	// with the identity, too.
	if !strings.EqualFold(sp.id(), asked.PrincipalID) && !strings.EqualFold(sp.id(), asked.ResourceID) {
		return graphError(c, badAssignment("The id in the path is neither principalId nor resourceId."))
	}
	identity, p := h.principal(asked.PrincipalID, "")
	if p != nil {
		return graphError(c, p)
	}
	resource, p := h.principal(asked.ResourceID, "")
	if p != nil {
		return graphError(c, p)
	}
	if identity.identity == nil || resource.app == nil {
		return graphError(c, badAssignment("principalId must be that of a client, and resourceId that of an app."))
	}
	role, ok := resource.app.role(asked.AppRoleID)
	if !ok {
		return graphError(c, badAssignment("Permission being assigned was not found on application '"+resource.appID()+"'."))
	}
	a, isNew := h.tenant.grant(*identity.identity, resource.app, role)
	if !isNew {
		return graphError(c, badAssignment("Permission being assigned already exists on the object"))
	}
	c.entry.Reason = identity.name() + " has " + role.Value + " at " + resource.name() + " now"
	return graphAnswer(c, http.StatusCreated,
		"servicePrincipals('"+sp.id()+"')/appRoleAssignedTo/$entity", a.fields())
}

func badAssignment(text string) *problem {
	return &problem{status: 400, code: "Request_BadRequest", text: text}
}

// role returns the app role with an ID, if it can be assigned to an identity.
func (a *App) role(id string) (AppRole, bool) {
	if id == noRole {
		return AppRole{}, len(a.Roles) == 0
	}
	i := slices.IndexFunc(a.Roles, func(r AppRole) bool { return strings.EqualFold(r.ID, id) })
	if i < 0 || !a.Roles[i].isForApps() {
		return AppRole{}, false
	}
	return a.Roles[i], true
}

func (sp principal) id() string {
	if sp.app != nil {
		return sp.app.ObjectID
	}
	return sp.identity.ObjectID
}

func (sp principal) appID() string {
	if sp.app != nil {
		return sp.app.ClientID
	}
	return sp.identity.ClientID
}

func (sp principal) name() string {
	if sp.app != nil {
		return sp.app.name()
	}
	return sp.identity.Name
}

func (sp principal) names() []string {
	if sp.app != nil {
		return []string{sp.app.URI, sp.app.ClientID}
	}
	return []string{sp.identity.ClientID}
}

// fields are those of a service principal that have to do with app roles.
func (sp principal) fields() map[string]any {
	f := map[string]any{
		"id":                        sp.id(),
		"appId":                     sp.appID(),
		"displayName":               sp.name(),
		"servicePrincipalNames":     sp.names(),
		"servicePrincipalType":      "ManagedIdentity",
		"accountEnabled":            true,
		"alternativeNames":          []string{},
		"appRoleAssignmentRequired": false,
		"appRoles":                  []any{},
	}
	if sp.app == nil && sp.identity.ResourceID != "" {
		f["alternativeNames"] = []string{"isExplicit=" + explicit(sp.identity), sp.identity.ResourceID}
		return f
	}
	f["servicePrincipalType"] = "Application"
	if sp.app == nil {
		return f
	}
	f["appRoleAssignmentRequired"] = sp.app.AssignmentRequired
	roles := []any{}
	for _, r := range sp.app.Roles {
		roles = append(roles, map[string]any{"id": r.ID, "value": r.Value, "displayName": r.DisplayName,
			"description": r.Description, "isEnabled": r.IsEnabled,
			"allowedMemberTypes": r.AllowedMemberTypes, "origin": "Application"})
	}
	f["appRoles"] = roles
	return f
}

func explicit(id *Identity) string {
	if id.SystemAssigned {
		return "False"
	}
	return "True"
}

// fields are those of an appRoleAssignment.
func (a assigned) fields() map[string]any {
	role := a.role.ID
	if role == "" {
		role = noRole
	}
	return map[string]any{
		"id":                   a.id,
		"deletedDateTime":      nil,
		"appRoleId":            role,
		"createdDateTime":      a.since.UTC().Format(time.RFC3339Nano),
		"principalDisplayName": a.identity.Name,
		"principalId":          a.identity.ObjectID,
		"principalType":        "ServicePrincipal",
		"resourceDisplayName":  a.app.name(),
		"resourceId":           a.app.ObjectID,
	}
}

// graphAnswer is an answer with the context that OData wants in it.
func graphAnswer(c *call, status int, context string, fields map[string]any) answer {
	fields["@odata.context"] = c.base() + "/v1.0/$metadata#" + context
	return jsonAnswer(status, fields)
}

// graphError is an error as Microsoft Graph writes it ("Microsoft Graph error
// responses and resource types", Microsoft).
func graphError(c *call, p *problem) answer {
	c.entry.Error, c.entry.Reason = p.code, p.text
	id := guid(unique())
	a := jsonAnswer(p.status, map[string]any{"error": map[string]any{
		"code":    p.code,
		"message": p.text,
		"innerError": map[string]string{
			"date":              time.Now().UTC().Format("2006-01-02T15:04:05"),
			"request-id":        id,
			"client-request-id": id,
		},
	}})
	if p.status == http.StatusUnauthorized {
		a.header.Set("WWW-Authenticate", `Bearer realm="", authorization_uri="`+c.base()+`/common/oauth2/authorize"`)
	}
	return a
}
