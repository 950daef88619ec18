package imdsfake

import (
	"crypto/sha1"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// This file is Entra's token endpoint, as far as programs outside of Azure use it:
// the client credentials grant (RFC 6749, section 4.4) of "Microsoft identity
// platform and the OAuth 2.0 client credentials flow" (Microsoft).

// Entra is any place with a way to Microsoft Entra, for programs that have a
// secret, a certificate or a federated token. Its [Handler.Env] are those that
// azidentity and others read. They must trust [Handler.Certificate], and be told not
// to ask Microsoft whether it is one of Entra's: azidentity's
// DisableInstanceDiscovery. With [Server.Client] neither is needed.
const Entra Host = "Entra"

// A ServicePrincipal is a program that gets its tokens from Entra itself, by one
// of the three ways to prove who it is. IDs that are left empty are made up.
type ServicePrincipal struct {
	// Name is what an Assignment may call it.
	Name string `json:"name"`

	// ClientID is its application ID, a GUID: the appid claim.
	ClientID string `json:"clientId"`

	// ObjectID is its own, a GUID: the oid claim.
	ObjectID string `json:"objectId"`

	// Secret is its client secret, if it has one.
	Secret string `json:"secret,omitempty"`

	// Certificate is that with whose key it signs assertions (RFC 7523), if it
	// has one.
	Certificate *x509.Certificate `json:"-"`

	// Subject is the sub claim of the federated token that it presents, if it
	// does: "system:serviceaccount:namespace:name", for a workload identity of
	// AKS. That token must be for api://AzureADTokenExchange, and not expired; its
	// signature is not checked.
	Subject string `json:"subject,omitempty"`
}

// identity returns what a service principal has in common with managed
// identities.
func (sp ServicePrincipal) identity() Identity {
	return Identity{Name: sp.Name, ClientID: sp.ClientID, ObjectID: sp.ObjectID}
}

// entra is the protocol. Its path has the tenant in it.
var entra = &protocol{
	host: Entra, method: http.MethodPost,
	selectors:    []string{"client_id"},
	authenticate: authenticateClient,
	write:        writeEntra, refuse: refuseEntra,
}

const entraPath = "/oauth2/v2.0/token"

// grant is what a request for the client credentials grant must have.
const (
	clientCredentials = "client_credentials"
	jwtBearer         = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
)

// authenticateClient returns the service principal that a request proves to be
// from.
func authenticateClient(h *Handler, c *call) (Identity, *problem) {
	switch {
	case c.query.bad || c.query.repeated() != "":
		return Identity{}, invalid("AADSTS900144: The request body is malformed, or has a parameter twice.")
	case c.query.get("grant_type") != clientCredentials:
		return Identity{}, &problem{status: 400, code: "unsupported_grant_type",
			text: "AADSTS70003: The app requested an unsupported grant type '" + c.query.get("grant_type") + "'."}
	case c.entry.Resource == "":
		return Identity{}, &problem{status: 400, code: "invalid_scope", text: "AADSTS1002012: The provided value for scope " +
			c.query.get("scope") + " is not valid. Client credential flows must have a scope value with /.default suffixed " +
			"to the resource identifier (application ID URI)."}
	}
	sp, ok := h.tenant.client(c.query.get("client_id"))
	if !ok {
		return Identity{}, &problem{status: 400, code: "unauthorized_client", text: "AADSTS700016: Application with " +
			"identifier '" + c.query.get("client_id") + "' was not found in the directory '" + h.tenant.id + "'."}
	}
	if c.query.get("client_assertion_type") == jwtBearer {
		c.proof = "2"
		if err := sp.checkAssertion(c, h); err != nil {
			return Identity{}, &problem{status: 401, code: "invalid_client",
				text: "AADSTS700027: The client assertion failed: " + err.Error()}
		}
		return sp.identity(), nil
	}
	c.proof = "1"
	if sp.Secret == "" || subtle.ConstantTimeCompare([]byte(c.query.get("client_secret")), []byte(sp.Secret)) != 1 {
		return Identity{}, &problem{status: 401, code: "invalid_client", text: "AADSTS7000215: Invalid client secret " +
			"provided. Ensure the secret being sent in the request is the client secret value, not the client secret " +
			"ID, for a secret added to app '" + sp.ClientID + "'."}
	}
	return sp.identity(), nil
}

// federatedAudience is what Entra expects a federated token to be for.
const federatedAudience = "api://AzureADTokenExchange"

// checkAssertion returns what is wrong with the assertion of a request: its own
// one, or a federated token.
func (sp ServicePrincipal) checkAssertion(c *call, h *Handler) error {
	assertion := c.query.get("client_assertion")
	claims := jwt.MapClaims{}
	token, _, err := jwt.NewParser().ParseUnverified(assertion, claims)
	if err != nil {
		return errors.New("it is no JSON Web Token")
	}
	if subject, _ := claims.GetSubject(); sp.Subject != "" && subject == sp.Subject {
		return jwt.NewValidator(jwt.WithExpirationRequired(), jwt.WithAudience(federatedAudience)).Validate(claims)
	}
	if sp.Certificate == nil {
		return errors.New("the application has no certificate, and the subject is not that of a federated credential")
	}
	sum1, sum256 := sha1.Sum(sp.Certificate.Raw), sha256.Sum256(sp.Certificate.Raw)
	known := []any{base64.RawURLEncoding.EncodeToString(sum1[:]), base64.StdEncoding.EncodeToString(sum1[:]),
		strings.ToUpper(hex.EncodeToString(sum1[:])), base64.RawURLEncoding.EncodeToString(sum256[:]), base64.StdEncoding.EncodeToString(sum256[:])}
	if !slices.Contains(known, token.Header["x5t"]) && !slices.Contains(known, token.Header["x5t#S256"]) {
		return errors.New("the key was not found by its thumbprint")
	}
	_, err = jwt.Parse(assertion, func(*jwt.Token) (any, error) { return sp.Certificate.PublicKey, nil },
		jwt.WithValidMethods([]string{"RS256", "PS256"}), jwt.WithExpirationRequired(),
		jwt.WithIssuer(sp.ClientID), jwt.WithSubject(sp.ClientID))
	if err != nil {
		return err
	}
	audience, _ := claims.GetAudience()
	if !slices.ContainsFunc(audience, func(a string) bool { return strings.Contains(a, "/"+h.tenant.id+"/") }) {
		return fmt.Errorf("its audience is %q", audience)
	}
	return nil
}

// client returns a service principal by its client ID.
func (t *tenant) client(id string) (ServicePrincipal, bool) {
	i := slices.IndexFunc(t.clients, func(sp ServicePrincipal) bool { return strings.EqualFold(sp.ClientID, id) })
	if i < 0 {
		return ServicePrincipal{}, false
	}
	return t.clients[i], true
}

// addClient adds a service principal, with the IDs that are empty made up.
func (t *tenant) addClient(sp ServicePrincipal) error {
	if sp.ClientID == "" {
		sp.ClientID = guid(t.id, "client", sp.Name)
	}
	if sp.ObjectID == "" {
		sp.ObjectID = guid(t.id, "object", sp.Name+sp.ClientID)
	}
	if sp.Name == "" {
		sp.Name = sp.ClientID
	}
	for _, id := range t.principals() {
		if id.is(sp.Name) || id.is(sp.ClientID) || id.is(sp.ObjectID) {
			return fmt.Errorf("%s is that of %q, too", sp.shared(id), id.Name)
		}
	}
	t.clients = append(t.clients, sp)
	return nil
}

// shared is the key, and its value, that a service principal has in common with
// another one.
func (sp ServicePrincipal) shared(id Identity) string {
	switch {
	case id.is(sp.Name):
		return "name: " + sp.Name
	case id.is(sp.ClientID):
		return "clientId: " + sp.ClientID
	}
	return "objectId: " + sp.ObjectID
}

// principals returns all to whom app roles can be assigned.
func (t *tenant) principals() []Identity {
	all := slices.Clone(t.identities)
	for _, sp := range t.clients {
		all = append(all, sp.identity())
	}
	return all
}

// scopeResource returns the resource of a scope, if it is one of this flow. Those
// of OpenID Connect, which MSAL adds always, mean nothing in it.
func scopeResource(scope string) string {
	words := slices.DeleteFunc(strings.Fields(scope), func(s string) bool {
		return s == "openid" || s == "offline_access" || s == "profile"
	})
	if len(words) != 1 || !strings.HasSuffix(words[0], "/.default") {
		return ""
	}
	return strings.TrimSuffix(words[0], "/.default")
}

// writeEntra writes the lifetime as a number, and no date.
func writeEntra(_ *call, tok issuedToken, _ Identity) map[string]any {
	lifetime := int64(tok.expiry.Sub(tok.issued) / time.Second)
	return map[string]any{
		"token_type":     "Bearer",
		"expires_in":     lifetime,
		"ext_expires_in": lifetime,
		"access_token":   tok.value,
	}
}

var errorNumber = regexp.MustCompile(`^AADSTS(\d+)`)

// refuseEntra is an error of "Microsoft Entra authentication and authorization
// error codes" (Microsoft).
func refuseEntra(p *problem) any {
	trace, correlation := guid(unique()), guid(unique())
	now := time.Now().UTC().Format("2006-01-02 15:04:05Z")
	numbers := []int{}
	if m := errorNumber.FindStringSubmatch(p.text); m != nil {
		n, _ := strconv.Atoi(m[1]) // digits
		numbers = append(numbers, n)
	}
	return map[string]any{
		"error": p.code,
		"error_description": p.text + " Trace ID: " + trace + " Correlation ID: " + correlation +
			" Timestamp: " + now,
		"error_codes":    numbers,
		"timestamp":      now,
		"trace_id":       trace,
		"correlation_id": correlation,
	}
}

// discovery answers the question of whether an authority is one of Entra's, which
// MSAL asks before it trusts one.
func (h *Handler) discovery(c *call) answer {
	hosts := []string{"login.microsoftonline.com", "login.windows.net", "login.microsoft.com", "sts.windows.net"}
	c.entry.Reason = "as published"
	return jsonAnswer(http.StatusOK, map[string]any{
		"tenant_discovery_endpoint": c.base() + "/" + h.tenant.id + "/v2.0/.well-known/openid-configuration",
		"api-version":               "1.1",
		"metadata": []any{map[string]any{
			"preferred_network": hosts[0], "preferred_cache": hosts[1], "aliases": hosts,
		}},
	})
}
