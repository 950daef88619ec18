package imdsfake

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
)

// A tenant is a directory, as far as IMDS has to do with it.
type tenant struct {
	id          string
	identities  []Identity
	clients     []ServicePrincipal
	apps        []*App
	open        bool // every resource is an app
	assignments []assigned
}

// assigned is an app role that an identity has.
type assigned struct {
	id       string
	identity Identity
	app      *App
	role     AppRole // the zero one stands for default access
	since    time.Time
}

// newTenant returns the tenant of a Handler. Its error begins with the place of
// the mistake.
func newTenant(h *Handler) (tenant, error) {
	t := tenant{id: h.Tenant, identities: slices.Clone(h.Identities), open: h.Apps == nil}
	if t.id == "" {
		t.id = DefaultTenant
	}
	if !guidForm.MatchString(t.id) {
		return t, fmt.Errorf("tenant: %q is not a GUID", t.id)
	}
	if t.identities == nil {
		t.identities = []Identity{{Name: "host", SystemAssigned: true}}
	}
	for i := range t.identities {
		t.identities[i].complete(t.id)
		if err := t.checkIdentity(i); err != nil {
			return t, fmt.Errorf("identities[%d]: %w", i, err)
		}
	}
	for i, sp := range h.ServicePrincipals {
		if err := t.addClient(sp); err != nil {
			return t, fmt.Errorf("servicePrincipals[%d]: %w", i, err)
		}
	}
	for i, a := range h.Apps {
		if err := t.addApp(a); err != nil {
			return t, fmt.Errorf("apps[%d]: %w", i, err)
		}
	}
	if !slices.ContainsFunc(t.apps, func(a *App) bool { return a.is(graphApp.URI) || a.is(graphApp.ClientID) }) {
		if err := t.addApp(graphApp); err != nil {
			return t, err
		}
	}
	for i, a := range h.Assignments {
		if err := t.assign(a); err != nil {
			return t, fmt.Errorf("assignments[%d]: %w", i, err)
		}
	}
	return t, nil
}

// complete makes up the IDs that are empty.
func (id *Identity) complete(tenant string) {
	known := id.Name + id.ClientID + id.ObjectID + id.ResourceID
	kind := "Microsoft.ManagedIdentity/userAssignedIdentities/"
	if id.SystemAssigned {
		kind = "Microsoft.Compute/virtualMachines/"
	}
	if id.ClientID == "" {
		id.ClientID = guid(tenant, "client", known)
	}
	if id.ObjectID == "" {
		id.ObjectID = guid(tenant, "object", known)
	}
	if id.Name == "" {
		id.Name = id.ClientID
	}
	if id.ResourceID == "" {
		id.ResourceID = resourceGroup(tenant) + "/providers/" + kind + id.Name
	}
}

// resourceGroup is the path of the one that everything is in.
func resourceGroup(tenant string) string {
	return "/subscriptions/" + guid(tenant, "subscription") + "/resourcegroups/imdsfake"
}

// checkIdentity returns what is wrong with the identity i, beside those before it.
func (t *tenant) checkIdentity(i int) error {
	id := t.identities[i]
	for _, other := range t.identities[:i] {
		switch {
		case id.SystemAssigned && other.SystemAssigned:
			return fmt.Errorf("%q is system-assigned, and so is %q", id.Name, other.Name)
		case strings.EqualFold(id.Name, other.Name):
			return fmt.Errorf("the name %q is that of another identity, too", id.Name)
		case strings.EqualFold(id.ClientID, other.ClientID):
			return fmt.Errorf("clientId: %s is that of %q, too", id.ClientID, other.Name)
		case strings.EqualFold(id.ObjectID, other.ObjectID):
			return fmt.Errorf("objectId: %s is that of %q, too", id.ObjectID, other.Name)
		case strings.EqualFold(id.ResourceID, other.ResourceID):
			return fmt.Errorf("resourceId: %s is that of %q, too", id.ResourceID, other.Name)
		}
	}
	return nil
}

// addApp adds an app, with the IDs that are empty made up.
func (t *tenant) addApp(a App) error {
	if a.ClientID == "" {
		a.ClientID = guid(t.id, "app", a.URI)
	}
	if a.ObjectID == "" {
		a.ObjectID = guid(t.id, "service principal", a.URI)
	}
	a.Roles = slices.Clone(a.Roles)
	for i := range a.Roles {
		if err := a.Roles[i].check(a.Roles[:i]); err != nil {
			return fmt.Errorf("roles[%d]: %w", i, err)
		}
		if a.Roles[i].ID == "" {
			a.Roles[i].ID = guid("role", a.Roles[i].Value)
		}
	}
	switch {
	case a.URI == "":
		return errors.New("uri: it is empty")
	case a.Lifetime != 0 && a.Lifetime < time.Second:
		return fmt.Errorf("lifetime: %v is less than a second", a.Lifetime)
	case a.TokenVersion < 0 || a.TokenVersion > 2:
		return fmt.Errorf("tokenVersion: %d is neither 1 nor 2", a.TokenVersion)
	}
	for _, b := range t.apps {
		switch {
		case b.is(a.URI):
			return fmt.Errorf("uri: %s is that of another app, too", a.URI)
		case b.is(a.ClientID):
			return fmt.Errorf("clientId: %s is that of %s, too", a.ClientID, b.URI)
		case strings.EqualFold(b.ObjectID, a.ObjectID):
			return fmt.Errorf("objectId: %s is that of %s, too", a.ObjectID, b.URI)
		}
	}
	t.apps = append(t.apps, &a)
	return nil
}

// issuer is the iss claim of v1 tokens.
func (t *tenant) issuer() string { return "https://sts.windows.net/" + t.id + "/" }

// issuerV2 is the iss claim of v2 tokens.
func (t *tenant) issuerV2() string { return "https://login.microsoftonline.com/" + t.id + "/v2.0" }

// hostID is the path of the host in Azure Resource Manager.
func (t *tenant) hostID() string {
	for _, id := range t.identities {
		if id.SystemAssigned {
			return id.ResourceID
		}
	}
	return resourceGroup(t.id) + "/providers/Microsoft.Compute/virtualMachines/host"
}

// identity returns the identity that a request selects, or the text of the
// error. Without a selector it is the system-assigned one or, where there is
// none, the only one.
func (t *tenant) identity(selector, value string) (_ Identity, text string) {
	var found []Identity
	for _, id := range t.identities {
		switch {
		case selector == "" && id.SystemAssigned:
			return id, ""
		case selector == "", strings.EqualFold(id.by(selector), value):
			found = append(found, id)
		}
	}
	switch {
	case len(found) == 1:
		return found[0], ""
	case len(found) > 1 && selector == "":
		return Identity{}, "Multiple user assigned identities exist, please specify the clientId / " +
			"resourceId of the identity in the token request"
	}
	return Identity{}, "Identity not found"
}

// by returns the ID that a parameter selects by.
func (id Identity) by(selector string) string {
	switch selector {
	case "client_id", "clientid":
		return id.ClientID
	case "object_id", "principal_id":
		return id.ObjectID
	}
	return id.ResourceID
}

// is tells whether a name or an ID is that of an identity.
func (id Identity) is(name string) bool {
	return name != "" && slices.ContainsFunc([]string{id.Name, id.ClientID, id.ObjectID, id.ResourceID},
		func(s string) bool { return strings.EqualFold(s, name) })
}

// is tells whether a resource names an app.
func (a *App) is(resource string) bool {
	return resource != "" && (strings.TrimSuffix(a.URI, "/") == strings.TrimSuffix(resource, "/") ||
		strings.EqualFold(a.ClientID, resource))
}

// name is what an app is called in texts.
func (a *App) name() string {
	if a.DisplayName == "" {
		return a.URI
	}
	return a.DisplayName
}

// app returns the app that a resource names.
func (t *tenant) app(resource string) (*App, bool) {
	for _, a := range t.apps {
		if a.is(resource) {
			return a, true
		}
	}
	return &App{URI: resource}, t.open
}

// sameResource tells whether two resources name one app.
func (t *tenant) sameResource(a, b string) bool {
	if x, ok := t.app(a); ok && x.is(b) {
		return true
	}
	return strings.TrimSuffix(a, "/") == strings.TrimSuffix(b, "/")
}

// assign grants an app role.
func (t *tenant) assign(a Assignment) error {
	principals := t.principals()
	i := slices.IndexFunc(principals, func(id Identity) bool { return id.is(a.Identity) })
	if i < 0 {
		return fmt.Errorf("identity: there is no identity %q", a.Identity)
	}
	app, ok := t.app(a.Resource)
	if !ok || app.ObjectID == "" {
		return fmt.Errorf("resource: there is no app %q", a.Resource)
	}
	var role AppRole
	if a.Role != "" || len(app.Roles) > 0 {
		j := slices.IndexFunc(app.Roles, func(r AppRole) bool { return r.Value == a.Role })
		if j < 0 {
			return fmt.Errorf("role: %s declares no app role %q", app.URI, a.Role)
		}
		role = app.Roles[j]
	}
	if !role.isForApps() {
		return fmt.Errorf("role: %q is for users only, or not enabled", a.Role)
	}
	t.grant(principals[i], app, role)
	return nil
}

// isForApps tells whether a role can be assigned to a service principal.
func (r AppRole) isForApps() bool {
	return r.Value == "" || r.IsEnabled && slices.Contains(r.AllowedMemberTypes, "Application")
}

// grant returns the assignment of a role, and whether it is a new one.
func (t *tenant) grant(id Identity, app *App, role AppRole) (assigned, bool) {
	for _, a := range t.assignments {
		if a.identity.ObjectID == id.ObjectID && a.app == app && a.role.ID == role.ID {
			return a, false
		}
	}
	a := assigned{guid("assignment", id.ObjectID, app.ObjectID, role.ID), id, app, role, time.Now()}
	t.assignments = append(t.assignments, a)
	return a, true
}

// assigned tells whether an identity has any role of an app.
func (t *tenant) assigned(id Identity, app *App) bool {
	return slices.ContainsFunc(t.assignments, func(a assigned) bool {
		return a.identity.ObjectID == id.ObjectID && a.app == app
	})
}

// rolesOf returns the values of the app roles that an identity has.
func (t *tenant) rolesOf(id Identity, app *App) []string {
	var roles []string
	for _, a := range t.assignments {
		if a.identity.ObjectID == id.ObjectID && a.app == app && a.role.Value != "" {
			roles = append(roles, a.role.Value)
		}
	}
	return roles
}

var guidForm = regexp.MustCompile(`^(?i)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// guid returns a GUID that is made up from names: the same one each time.
func guid(names ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(names, "\x00")))
	sum[6] = sum[6]&0x0f | 0x80 // RFC 9562, section 5.8: version 8,
	sum[8] = sum[8]&0x3f | 0x80 // and the variant
	return fmt.Sprintf("%x-%x-%x-%x-%x", sum[0:4], sum[4:6], sum[6:8], sum[8:10], sum[10:16])
}
