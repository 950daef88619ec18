package imdsfake

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// An Identity is a managed identity of the host. IDs that are left empty are
// made up from the others: the same ones each time.
type Identity struct {
	// Name is what an Assignment may call it.
	Name string

	// ClientID is its application ID, a GUID: the appid claim.
	ClientID string

	// ObjectID is that of its service principal, a GUID: the oid claim.
	ObjectID string

	// ResourceID is its path in Azure Resource Manager: the xms_mirid claim.
	ResourceID string

	// SystemAssigned says that it is the host's own, which requests that name
	// no identity get.
	SystemAssigned bool
}

// An App is the registration of a service in the tenant.
type App struct {
	// URI is its App ID URI, such as "https://myapp.aztoso.com". Clients ask for
	// tokens by it, or by the client ID.
	URI string

	// ClientID is its application ID, a GUID. If empty, one is made up.
	ClientID string

	// Roles are the app roles that it declares.
	Roles []AppRole
}

// An AppRole is a role that an app declares, as a manifest has it.
type AppRole struct {
	ID                 string   `json:"id,omitempty"` // a GUID; made up by ParseManifest if empty
	AllowedMemberTypes []string `json:"allowedMemberTypes"`
	Description        string   `json:"description"`
	DisplayName        string   `json:"displayName"`
	IsEnabled          bool     `json:"isEnabled"`
	Value              string   `json:"value"` // what the roles claim has
}

// An Assignment is an app role that an identity has.
type Assignment struct {
	Identity string // its name, or one of its IDs
	Resource string // the App ID URI or client ID of the app
	Role     string // the value of the app role
}

// ParseManifest parses the file that "az ad app create --app-roles" takes: a JSON
// array of app roles. It is stricter than that command: an unknown field is an
// error, since it would otherwise be a role that is silently not what it seems.
func ParseManifest(data []byte) ([]AppRole, error) {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	var roles []AppRole
	if err := d.Decode(&roles); err != nil {
		return nil, fmt.Errorf("imdsfake: manifest: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("imdsfake: manifest: it goes on after the array of app roles")
	}
	for i, r := range roles {
		if err := r.check(roles[:i]); err != nil {
			return nil, fmt.Errorf("imdsfake: manifest: app role %d: %w", i, err)
		}
		if r.ID == "" {
			roles[i].ID = guid("role", r.Value)
		}
	}
	return roles, nil
}

// check returns what is wrong with an app role that comes after others.
func (r AppRole) check(others []AppRole) error {
	switch {
	case r.Value == "":
		return errors.New("value is empty")
	case strings.ContainsAny(r.Value, " \t\r\n"):
		return fmt.Errorf("value %q has a space in it", r.Value)
	case slices.ContainsFunc(others, func(o AppRole) bool { return o.Value == r.Value }):
		return fmt.Errorf("value %q is that of another role, too", r.Value)
	case len(r.AllowedMemberTypes) == 0:
		return errors.New("allowedMemberTypes is empty")
	}
	for _, t := range r.AllowedMemberTypes {
		if t != "Application" && t != "User" {
			return fmt.Errorf("allowedMemberTypes has %q, which is neither Application nor User", t)
		}
	}
	return nil
}

// A tenant is a directory, as far as IMDS has to do with it.
type tenant struct {
	id         string
	identities []Identity
	apps       []App               // nil: every resource is an app
	roles      map[string][]string // by object ID and App ID URI
}

// newTenant returns the tenant of a Handler. It panics where the fields
// contradict each other.
func newTenant(h *Handler) tenant {
	t := tenant{id: h.Tenant, identities: slices.Clone(h.Identities), apps: slices.Clone(h.Apps)}
	t.roles = map[string][]string{}
	if t.id == "" {
		t.id = DefaultTenant
	}
	if t.identities == nil {
		t.identities = []Identity{{Name: "host", SystemAssigned: true}}
	}
	for i := range t.identities {
		t.identities[i].complete(t.id)
	}
	for i := range t.apps {
		if t.apps[i].ClientID == "" {
			t.apps[i].ClientID = guid(t.id, "app", t.apps[i].URI)
		}
	}
	for _, a := range h.Assignments {
		t.assign(a)
	}
	return t
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
	if id.ResourceID == "" {
		name := id.Name
		if name == "" {
			name = id.ClientID
		}
		id.ResourceID = "/subscriptions/" + guid(tenant, "subscription") +
			"/resourcegroups/imdsfake/providers/" + kind + name
	}
}

// issuer is the iss claim of v1 tokens.
func (t *tenant) issuer() string { return "https://sts.windows.net/" + t.id + "/" }

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

// by returns the ID that a query parameter selects by.
func (id Identity) by(selector string) string {
	switch selector {
	case "client_id":
		return id.ClientID
	case "object_id", "principal_id":
		return id.ObjectID
	}
	return id.ResourceID
}

// app returns the app that a resource names.
func (t *tenant) app(resource string) (App, bool) {
	if t.apps == nil {
		return App{URI: resource}, true
	}
	for _, a := range t.apps {
		if strings.TrimSuffix(a.URI, "/") == strings.TrimSuffix(resource, "/") ||
			strings.EqualFold(a.ClientID, resource) {
			return a, true
		}
	}
	return App{}, false
}

// assign grants an app role.
func (t *tenant) assign(a Assignment) {
	i := slices.IndexFunc(t.identities, func(id Identity) bool {
		return a.Identity != "" && slices.ContainsFunc(
			[]string{id.Name, id.ClientID, id.ObjectID, id.ResourceID},
			func(s string) bool { return strings.EqualFold(s, a.Identity) })
	})
	app, ok := t.app(a.Resource)
	declared := slices.ContainsFunc(app.Roles, func(r AppRole) bool { return r.Value == a.Role })
	switch {
	case i < 0:
		panic(fmt.Sprintf("imdsfake: assignment %+v: there is no such identity", a))
	case !ok || t.apps == nil:
		panic(fmt.Sprintf("imdsfake: assignment %+v: there is no such app", a))
	case !declared:
		panic(fmt.Sprintf("imdsfake: assignment %+v: the app declares no such role", a))
	}
	key := t.identities[i].ObjectID + " " + app.URI
	if !slices.Contains(t.roles[key], a.Role) {
		t.roles[key] = append(t.roles[key], a.Role)
	}
}

// rolesOf returns the app roles that an identity has.
func (t *tenant) rolesOf(id Identity, app App) []string {
	return slices.Clone(t.roles[id.ObjectID+" "+app.URI])
}

// guid returns a GUID that is made up from names: the same one each time.
func guid(names ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(names, "\x00")))
	sum[6] = sum[6]&0x0f | 0x80 // RFC 9562, section 5.8: version 8,
	sum[8] = sum[8]&0x3f | 0x80 // and the variant
	return fmt.Sprintf("%x-%x-%x-%x-%x", sum[0:4], sum[4:6], sum[6:8], sum[8:10], sum[10:16])
}
