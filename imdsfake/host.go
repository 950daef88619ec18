package imdsfake

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// This file is what each kind of host has for its processes to ask for tokens:
// where, what a request must have, and what the answers look like.

// A Host is a kind of place where programs run that have managed identities.
type Host string

const (
	// IMDS is a virtual machine, or what is built from them: scale sets, AKS.
	IMDS Host = "IMDS"

	// AppService is App Service, Functions and Container Apps.
	AppService Host = "App Service"

	// AzureML is a compute instance or cluster of Azure Machine Learning.
	AzureML Host = "Azure ML"

	// CloudShell is Azure Cloud Shell.
	CloudShell Host = "Cloud Shell"

	// Arc is a machine outside of Azure with the agent of Azure Arc.
	Arc Host = "Azure Arc"

	// ServiceFabric is a cluster of Service Fabric. Its clients insist on https.
	ServiceFabric Host = "Service Fabric"
)

const (
	tokenPath         = "/metadata/identity/oauth2/token"
	appServicePath    = "/appservice/msi/token"
	azureMLPath       = "/azureml/msi/token"
	cloudShellPath    = "/cloudshell/oauth2/token"
	arcPath           = "/arc" + tokenPath
	serviceFabricPath = "/servicefabric" + tokenPath
)

// Env returns the environment variables by which clients know a host, for a
// Handler that is served at base: "http://127.0.0.1:8169", say, and https for
// ServiceFabric and Entra. Those of IMDS are for clients that can be told its address;
// most cannot. Variables of other hosts must not be set at the same time.
func (h *Handler) Env(host Host, base string) map[string]string {
	h.ready()
	base = strings.TrimSuffix(base, "/")
	switch host {
	case IMDS:
		return map[string]string{"AZURE_POD_IDENTITY_AUTHORITY_HOST": base}
	case AppService:
		return map[string]string{"IDENTITY_ENDPOINT": base + appServicePath, "IDENTITY_HEADER": h.secret}
	case AzureML:
		return map[string]string{"MSI_ENDPOINT": base + azureMLPath, "MSI_SECRET": h.secret}
	case CloudShell:
		return map[string]string{"MSI_ENDPOINT": base + cloudShellPath}
	case Arc:
		return map[string]string{"IDENTITY_ENDPOINT": base + arcPath, "IMDS_ENDPOINT": base + "/arc"}
	case Entra:
		return map[string]string{"AZURE_AUTHORITY_HOST": base, "AZURE_TENANT_ID": h.tenant.id}
	case ServiceFabric:
		return map[string]string{"IDENTITY_ENDPOINT": base + serviceFabricPath, "IDENTITY_HEADER": h.secret,
			"IDENTITY_SERVER_THUMBPRINT": thumbprint()}
	}
	panic(fmt.Sprintf("imdsfake: there is no host %q", host))
}

// capabilities is the parameter by which MSAL tells what clients can bear, such
// as that a service refuses a token before its time.
const capabilities = "xms_cc"

// A protocol is how a kind of host hands out tokens.
type protocol struct {
	host     Host
	method   string
	versions []string // of the API, the newest one last; nil if it has none

	// selectors are the parameters that select an identity; nil if none does. An
	// empty one is an error, unless emptyIsNone.
	selectors   []string
	emptyIsNone bool

	// options are the parameters that may be there beside these.
	options []string

	// check returns what is wrong with the header of a request.
	check func(*Handler, *call) *problem

	// authenticate, if not nil, returns whom a request is from, in place of check
	// and of what the parameters select.
	authenticate func(*Handler, *call) (Identity, *problem)

	// write returns the answer with a token, refuse the one with an error.
	write  func(*call, issuedToken, Identity) map[string]any
	refuse func(*problem) any
}

// protocols are known by their paths. Those of the hosts other than IMDS are the
// fake's own: clients find them in their environment.
var protocols = map[string]*protocol{
	// "How to use managed identities for Azure resources on an Azure VM to
	// acquire an access token" (Microsoft). principal_id and mi_res_id are
	// aliases that IMDS takes, too.
	tokenPath: {
		host: IMDS, method: http.MethodGet,
		versions:  []string{"2018-02-01", "2019-08-01", "2021-02-01"},
		selectors: []string{"client_id", "object_id", "principal_id", "msi_res_id", "mi_res_id"},
		check:     checkIMDS, write: writeStrings, refuse: writeError,
	},
	// "How to use managed identities for App Service and Azure Functions"
	// (Microsoft), REST endpoint reference.
	appServicePath: {
		host: AppService, method: http.MethodGet,
		versions:  []string{"2019-08-01"},
		selectors: []string{"client_id", "principal_id", "object_id", "mi_res_id"},
		options:   []string{capabilities, refused},
		check:     checkAppService, write: writeAppService, refuse: refuseAppService,
	},
	// What MSAL sends there, an early version of App Service's protocol.
	azureMLPath: {
		host: AzureML, method: http.MethodGet,
		versions:  []string{"2017-09-01"},
		selectors: []string{"clientid"}, emptyIsNone: true,
		check: checkAzureML, write: writeAzureML, refuse: refuseAppService,
	},
	cloudShellPath: {
		host: CloudShell, method: http.MethodPost,
		check: checkCloudShell, write: writeStrings, refuse: refuseCloudShell,
	},
	// "Authenticate against Azure resources with Azure Arc-enabled servers"
	// (Microsoft).
	arcPath: {
		host: Arc, method: http.MethodGet,
		versions:  []string{"2019-11-01", "2020-06-01"},
		selectors: []string{"client_id", "object_id", "msi_res_id"},
		check:     checkArc, write: writeArc, refuse: writeError,
	},
	// "How to leverage a Service Fabric application's managed identity to access
	// Azure services" (Microsoft).
	serviceFabricPath: {
		host: ServiceFabric, method: http.MethodGet,
		versions: []string{"2019-07-01-preview"},
		options:  []string{capabilities, refused},
		check:    checkServiceFabric, write: writeServiceFabric, refuse: refuseServiceFabric,
	},
}

// selected returns the parameter that selects an identity, if one does.
func (p *protocol) selected(q parameters) string {
	for _, name := range p.selectors {
		if q.has(name) && (q.get(name) != "" || !p.emptyIsNone) {
			return name
		}
	}
	return ""
}

func checkIMDS(_ *Handler, c *call) *problem {
	switch {
	case c.Header.Get("X-Forwarded-For") != "":
		return invalid("Requests with a X-Forwarded-For header are refused")
	case c.Header.Get("Metadata") != "true":
		return &problem{status: 400, code: "bad_request_102", text: "Required metadata header not specified"}
	}
	return nil
}

func checkAppService(h *Handler, c *call) *problem {
	return h.checkSecret(c, "X-IDENTITY-HEADER")
}

func checkAzureML(h *Handler, c *call) *problem { return h.checkSecret(c, "secret") }

// checkSecret returns what is wrong with the header by which a host knows its own
// processes, and wards off those who can make somebody else send a request.
func (h *Handler) checkSecret(c *call, name string) *problem {
	p := &problem{status: http.StatusUnauthorized, code: "unauthorized_client"}
	switch c.Header.Get(name) {
	case h.secret:
		return nil
	case "":
		p.kind, p.text = noSecret, "The "+name+" header is missing"
	default:
		p.kind, p.text = wrongSecret, "The "+name+" header is not that of this host"
	}
	return p
}

func checkCloudShell(_ *Handler, c *call) *problem {
	if c.Header.Get("Metadata") != "true" {
		return &problem{status: 400, code: "bad_request_102", text: "Required metadata header not specified"}
	}
	if kind, _, _ := strings.Cut(c.Header.Get("Content-Type"), ";"); kind != "application/x-www-form-urlencoded" {
		return invalid("The Content-Type must be application/x-www-form-urlencoded")
	}
	return nil
}

func checkServiceFabric(h *Handler, c *call) *problem {
	if c.TLS == nil && c.URL.Scheme != "https" {
		return invalid("Service Fabric takes requests over https only")
	}
	return h.checkSecret(c, "Secret")
}

// writeStrings is the answer of IMDS. It writes numbers as strings, and counts
// expires_in from the issue of the token, not from now.
func writeStrings(c *call, tok issuedToken, id Identity) map[string]any {
	lifetime := strconv.FormatInt(int64(tok.expiry.Sub(tok.issued)/time.Second), 10)
	return map[string]any{
		"access_token":   tok.value,
		"client_id":      id.ClientID,
		"expires_in":     lifetime,
		"expires_on":     unix(tok.expiry),
		"ext_expires_in": lifetime,
		"not_before":     unix(tok.issued),
		"resource":       c.entry.Resource,
		"token_type":     "Bearer",
	}
}

// writeArc confirms the identity that was asked for, without which clients do not
// trust an agent that may be too old to know of any but its own.
func writeArc(c *call, tok issuedToken, id Identity) map[string]any {
	fields := writeStrings(c, tok, id)
	if c.selector != "" {
		fields[c.selector] = id.by(c.selector)
	}
	return fields
}

func writeAppService(c *call, tok issuedToken, id Identity) map[string]any {
	fields := writeStrings(c, tok, id)
	delete(fields, "expires_in")
	delete(fields, "ext_expires_in")
	return fields
}

// writeAzureML writes the expiry as a date, without a zone, in UTC.
func writeAzureML(c *call, tok issuedToken, _ Identity) map[string]any {
	return map[string]any{
		"access_token": tok.value,
		"expires_on":   tok.expiry.UTC().Format("01/02/2006 15:04:05"),
		"resource":     c.entry.Resource,
		"token_type":   "Bearer",
	}
}

// writeServiceFabric writes the expiry as a number.
func writeServiceFabric(c *call, tok issuedToken, _ Identity) map[string]any {
	return map[string]any{
		"access_token": tok.value,
		"expires_on":   tok.expiry.Unix(),
		"resource":     c.entry.Resource,
		"token_type":   "Bearer",
	}
}

func unix(t time.Time) string { return strconv.FormatInt(t.Unix(), 10) }

func refuseAppService(p *problem) any {
	text := p.text
	if p.kind == noIdentity {
		text = "No User Assigned or Delegated Managed Identity found for specified ClientId/ResourceId/PrincipalId."
	}
	return map[string]any{"statusCode": p.status, "message": text}
}

func refuseCloudShell(p *problem) any {
	code := "BadRequest"
	if p.kind == unknownResource {
		code = "AudienceNotSupported"
	}
	return map[string]any{"error": map[string]string{"code": code, "message": p.text}}
}

func refuseServiceFabric(p *problem) any {
	code, text := "InternalServerError", p.text
	switch p.kind {
	case noSecret:
		code, text = "SecretHeaderNotFound", "Secret is not found in the request headers."
	case wrongSecret, noIdentity:
		code, text = "ManagedIdentityNotFound", "Managed identity not found for the specified application host."
	case noResource:
		code, text = "ArgumentNullOrEmpty", "The parameter 'resource' should not be null or empty string."
	case badVersion:
		code = "InvalidApiVersion"
	}
	return map[string]any{"error": map[string]string{
		"code": code, "message": text, "correlationId": guid(unique())}}
}
