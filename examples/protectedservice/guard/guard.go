// Package guard lets in to a service whom it is meant for: callers with an access
// token of Microsoft Entra for this very service, issued to an application of one
// tenant, which has an app role or is on a list.
//
// It stands on its own, with go-oidc: copy it. Nothing in it knows of mitoken; it
// would do the same for a client in any other language.
package guard

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
)

// A Guard checks the tokens of requests as "Secure applications and APIs by
// validating claims" (Microsoft) and RFC 9068 ask for: signature, issuer, tenant,
// audience, lifetime, and that they are an application's own, not those of one that
// acts for a user. Its fields must not be changed after first use. It is safe for
// concurrent use.
type Guard struct {
	// Tenant is the ID of the only directory whose tokens count, a GUID. Managed
	// identities have tokens of their own tenant only.
	Tenant string

	// Audiences are what the service is called in tokens: its App ID URI, and its
	// client ID, which those of version 2 have.
	Audiences []string

	// Issuers are who may issue tokens. If nil, they are the tenant's, for version
	// 1 and version 2.
	Issuers []string

	// KeysURL is where the keys are that tokens are signed with. If empty, it is
	// where Entra publishes those of the tenant.
	KeysURL string

	// Client gets the keys. If nil, one is used that gives up after 5 seconds.
	Client *http.Client

	// Logger is told why a token was refused, which its bearer is not. If nil,
	// nobody is.
	Logger *slog.Logger

	verifier *oidc.IDTokenVerifier
}

// maxToken is how long a token may be. One with 100 app roles has half of that.
const maxToken = 16 << 10

// A Caller is who sent a request.
type Caller struct {
	ClientID string   // of its application: the appid claim, or azp in version 2
	ObjectID string   // oid: no two in the tenant share one, ever
	Roles    []string // the app roles that it was assigned
}

// A Rule says what a caller lacks to be let in: nothing, if it is empty.
type Rule func(Caller) (lacks string)

// Role lets in who has an app role.
func Role(value string) Rule {
	return func(c Caller) string {
		if slices.Contains(c.Roles, value) {
			return ""
		}
		return fmt.Sprintf("the app role %q", value)
	}
}

// Callers lets in those on a list of client IDs and object IDs. Entra issues tokens
// for a service to every application of the tenant: without a Role, such a list is
// what keeps them out.
func Callers(ids ...string) Rule {
	return func(c Caller) string {
		if slices.ContainsFunc(ids, func(id string) bool {
			return strings.EqualFold(id, c.ClientID) || strings.EqualFold(id, c.ObjectID)
		}) {
			return ""
		}
		return "to be on the list of callers"
	}
}

// Any lets in who meets one of several rules.
func Any(rules ...Rule) Rule {
	return func(c Caller) string {
		var lacks []string
		for _, r := range rules {
			l := r(c)
			if l == "" {
				return ""
			}
			lacks = append(lacks, l)
		}
		return strings.Join(lacks, " or ")
	}
}

type contextKey struct{}

// From returns who sent a request that a Guard has let in.
func From(ctx context.Context) (Caller, bool) {
	c, ok := ctx.Value(contextKey{}).(Caller)
	return c, ok
}

// Require returns a handler for those who meet a rule. The others get 401 if it is
// not known who they are, and 403 with what they lack if it is. It panics if the
// Guard is not set up, as http.ServeMux.Handle does.
func (g *Guard) Require(rule Rule, next http.Handler) http.Handler {
	if err := g.init(); err != nil {
		panic("guard: " + err.Error())
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, ok := bearer(r)
		if !ok {
			g.refuse(w, http.StatusUnauthorized, "", "A bearer token is required.")
			return
		}
		c, err := g.verify(r.Context(), token)
		if err != nil {
			g.log(r, err)
			g.refuse(w, http.StatusUnauthorized, "invalid_token", "The token is not valid here.")
			return
		}
		if lacks := rule(c); lacks != "" {
			g.log(r, fmt.Errorf("%s lacks %s", c.ClientID, lacks))
			g.refuse(w, http.StatusForbidden, "insufficient_scope", "The caller lacks "+lacks+".")
			return
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), contextKey{}, c)))
	})
}

var guid = regexp.MustCompile(`^(?i)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// init returns what is wrong with the fields.
func (g *Guard) init() error {
	if g.verifier != nil {
		return nil
	}
	switch {
	case !guid.MatchString(g.Tenant):
		return fmt.Errorf("the Tenant is %q, not a GUID: which directory's tokens count?", g.Tenant)
	case len(g.Audiences) == 0 || slices.Contains(g.Audiences, ""):
		return errors.New("the Audiences are missing: what is the service called in tokens?")
	}
	if g.Issuers == nil {
		g.Issuers = []string{
			"https://sts.windows.net/" + g.Tenant + "/",
			"https://login.microsoftonline.com/" + g.Tenant + "/v2.0",
		}
	}
	url := g.KeysURL
	if url == "" {
		url = "https://login.microsoftonline.com/" + g.Tenant + "/discovery/v2.0/keys"
	}
	g.verifier = oidc.NewVerifier("", newKeySet(url, g.Client, g.Tenant), &oidc.Config{
		SupportedSigningAlgs: []string{oidc.RS256}, // Entra's; "none" is never one
		SkipIssuerCheck:      true,                 // there may be two: see verify
		SkipClientIDCheck:    true,                 // the same
	})
	return nil
}

// verify returns whom a token was issued to, if it is good for this service.
func (g *Guard) verify(ctx context.Context, token string) (Caller, error) {
	if len(token) > maxToken {
		return Caller{}, fmt.Errorf("the token has %d bytes", len(token))
	}
	verified, err := g.verifier.Verify(ctx, token) // signature, alg, exp, nbf
	if err != nil {
		return Caller{}, err
	}
	var claims struct {
		Tenant  string   `json:"tid"`
		AppID   string   `json:"appid"`
		AZP     string   `json:"azp"`
		OID     string   `json:"oid"`
		Subject string   `json:"sub"`
		Roles   []string `json:"roles"`
		Scopes  string   `json:"scp"`
		Kind    string   `json:"idtyp"`
	}
	if err := verified.Claims(&claims); err != nil {
		return Caller{}, err
	}
	c := Caller{ClientID: claims.AppID + claims.AZP, ObjectID: claims.OID, Roles: claims.Roles}
	switch {
	case !time.Now().Before(verified.Expiry): // go-oidc takes it in its last moment
		return Caller{}, errors.New("it has expired just now")
	case !slices.Contains(g.Issuers, verified.Issuer):
		return Caller{}, fmt.Errorf("iss is %q", verified.Issuer)
	case claims.Tenant != g.Tenant:
		return Caller{}, fmt.Errorf("tid is %q", claims.Tenant)
	case !slices.ContainsFunc(verified.Audience, func(a string) bool { return slices.Contains(g.Audiences, a) }):
		return Caller{}, fmt.Errorf("aud is %q", verified.Audience)
	case claims.AppID != "" && claims.AZP != "" || c.ClientID == "":
		return Caller{}, errors.New("it is not said which application it was issued to")
	case claims.Scopes != "", claims.Kind != "" && claims.Kind != "app", claims.OID == "", claims.OID != claims.Subject:
		return Caller{}, errors.New("it is not an application's own token")
	}
	return c, nil
}

// refuse answers with a challenge (RFC 6750, section 3), which has no error code
// where there was no token to find fault with.
func (g *Guard) refuse(w http.ResponseWriter, status int, code, text string) {
	challenge := fmt.Sprintf("Bearer realm=%q", g.Audiences[0])
	if code != "" {
		challenge += fmt.Sprintf(", error=%q, error_description=%q", code, strings.ReplaceAll(text, `"`, "'"))
	}
	w.Header().Set("WWW-Authenticate", challenge)
	http.Error(w, text, status)
}

func (g *Guard) log(r *http.Request, err error) {
	if g.Logger != nil {
		g.Logger.WarnContext(r.Context(), "refused", "method", r.Method, "path", r.URL.Path, "reason", err)
	}
}

// bearer returns the token of a request. With a second Authorization header there
// is none: who is to say which of them counts?
func bearer(r *http.Request) (token string, ok bool) {
	values := r.Header.Values("Authorization")
	if len(values) != 1 {
		return "", false
	}
	scheme, token, _ := strings.Cut(values[0], " ")
	token = strings.TrimSpace(token)
	return token, strings.EqualFold(scheme, "Bearer") && token != "" // RFC 9110, section 11.1
}
