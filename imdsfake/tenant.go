package imdsfake

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// An Identity is a managed identity of the host. IDs that are left empty are
// made up from the others: the same ones each time.
type Identity struct {
	// Name is what an Assignment may call it.
	Name string `json:"name"`

	// ClientID is its application ID, a GUID: the appid claim.
	ClientID string `json:"clientId"`

	// ObjectID is that of its service principal, a GUID: the oid claim.
	ObjectID string `json:"objectId"`

	// ResourceID is its path in Azure Resource Manager: the xms_mirid claim.
	ResourceID string `json:"resourceId"`

	// SystemAssigned says that it is the host's own, which requests that name
	// no identity get.
	SystemAssigned bool `json:"systemAssigned"`
}

// An App is the registration of a service in the tenant, and its service
// principal. IDs that are left empty are made up.
type App struct {
	// URI is its App ID URI, such as "https://myapp.aztoso.com". Clients ask for
	// tokens by it, or by the client ID.
	URI string `json:"uri"`

	// DisplayName is what people call it.
	DisplayName string `json:"displayName,omitempty"`

	// ClientID is its application ID, a GUID.
	ClientID string `json:"clientId"`

	// ObjectID is that of its service principal, a GUID.
	ObjectID string `json:"objectId"`

	// Roles are the app roles that it declares.
	Roles []AppRole `json:"roles"`

	// TokenVersion is that of its tokens, 1 or 2: what its manifest calls
	// requestedAccessTokenVersion. If zero, it is 1.
	TokenVersion int `json:"tokenVersion,omitempty"`

	// Lifetime is that of its tokens. If zero, it is the Handler's.
	Lifetime time.Duration `json:"lifetime,omitempty"`

	// AssignmentRequired says that nobody gets tokens for it who has not been
	// assigned an app role.
	AssignmentRequired bool `json:"assignmentRequired,omitempty"`
}

// An AppRole is a role that an app declares, as a manifest has it.
type AppRole struct {
	ID                 string   `json:"id,omitempty"` // a GUID; made up if empty
	AllowedMemberTypes []string `json:"allowedMemberTypes"`
	Description        string   `json:"description"`
	DisplayName        string   `json:"displayName"`
	IsEnabled          bool     `json:"isEnabled"`
	Value              string   `json:"value"` // what the roles claim has
}

// An Assignment is an app role that an identity has.
type Assignment struct {
	Identity string `json:"identity"` // its name, or one of its IDs; or those of a service principal
	Resource string `json:"resource"` // the App ID URI or client ID of the app
	Role     string `json:"role"`     // the value of the app role; empty for an app that declares none
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
	case r.ID != "" && slices.ContainsFunc(others, func(o AppRole) bool { return strings.EqualFold(o.ID, r.ID) }):
		return fmt.Errorf("id %s is that of another role, too", r.ID)
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

// A Directory is the tenant of a Handler, with all that was made up in it.
type Directory struct {
	Tenant      string       `json:"tenant"`
	Issuer      string       `json:"issuer"` // of v1 tokens
	Identities  []Identity   `json:"identities"`
	Apps        []App        `json:"apps"`
	Assignments []Assignment `json:"assignments"` // by the names of identities and the URIs of apps

	// ServicePrincipals have no Secret here.
	ServicePrincipals []ServicePrincipal `json:"servicePrincipals"`
}

// Directory returns the tenant as it is.
func (h *Handler) Directory() Directory {
	h.ready()
	h.mu.Lock()
	defer h.mu.Unlock()
	d := Directory{Tenant: h.tenant.id, Issuer: h.tenant.issuer(), Identities: slices.Clone(h.tenant.identities)}
	for _, sp := range h.tenant.clients {
		sp.Secret = ""
		d.ServicePrincipals = append(d.ServicePrincipals, sp)
	}
	for _, a := range h.tenant.apps {
		app := *a
		app.Roles = slices.Clone(a.Roles)
		d.Apps = append(d.Apps, app)
	}
	for _, a := range h.tenant.assignments {
		d.Assignments = append(d.Assignments, Assignment{a.identity.Name, a.app.URI, a.role.Value})
	}
	return d
}

// Issuer returns the issuer of v1 tokens, their iss claim. All Handlers of a
// process sign with one key, until they rotate it: what tells their tenants apart
// is iss and tid, as with Entra.
func (h *Handler) Issuer() string {
	h.ready()
	return h.tenant.issuer()
}

// Assign grants app roles. They are in the tokens that are issued from then on:
// a token that the Cache gives out again has the roles that it had. It panics if
// the identity, the app or the role is not there.
func (h *Handler) Assign(assignments ...Assignment) {
	h.ready()
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, a := range assignments {
		if err := h.tenant.assign(a); err != nil {
			panic("imdsfake: assignment: " + err.Error())
		}
	}
}

// Check returns what is wrong with the fields of a Handler, which would panic
// with its first use. The error begins with the place, as in "apps[1]: uri: ...".
func (h *Handler) Check() error {
	h.once.Do(h.init)
	return h.wrong
}

// ready makes the Handler ready to be used, or panics.
func (h *Handler) ready() {
	if err := h.Check(); err != nil {
		panic("imdsfake: " + err.Error())
	}
}

func (h *Handler) init() {
	h.cache = map[cacheKey]*cached{}
	h.secret = h.Secret
	if h.secret == "" {
		h.secret = unique()
	}
	switch {
	case h.Lifetime != 0 && h.Lifetime < time.Second:
		h.wrong = fmt.Errorf("lifetime: %v is less than a second", h.Lifetime)
	case !slices.Contains(caches, h.Cache):
		h.wrong = fmt.Errorf("cache: %q is none of %q", h.Cache, caches[1:])
	case h.Limits.PerSecond < 0 || h.Limits.AtOnce < 0:
		h.wrong = fmt.Errorf("limits: %+v are negative", h.Limits)
	default:
		h.tenant, h.wrong = newTenant(h)
	}
}
