package guard

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	tenant   = "11111111-2222-4333-8444-555555555555"
	other    = "99999999-2222-4333-8444-555555555555"
	audience = "https://myapp.aztoso.com"
	clientID = "a0000000-0000-4000-8000-000000000001"
	daemon   = "da000000-0000-4000-8000-000000000001"
	daemonID = "0b000000-0000-4000-8000-000000000001"
)

// entra publishes keys, and signs whatever it is told to.
type entra struct {
	keys    map[string]*rsa.PrivateKey
	issuer  string // beside the keys, if not empty
	down    bool
	mu      sync.Mutex
	fetches int
}

var makeKey = sync.OnceValue(func() *rsa.PrivateKey { return newKey() })

func newKey() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
}

func newEntra() *entra { return &entra{keys: map[string]*rsa.PrivateKey{"k1": makeKey()}} }

func (e *entra) RoundTrip(req *http.Request) (*http.Response, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.fetches++
	if e.down {
		return nil, errors.New("connection refused")
	}
	if want := "https://login.microsoftonline.com/" + tenant + "/discovery/v2.0/keys"; req.URL.String() != want {
		return nil, fmt.Errorf("asked for %s", req.URL)
	}
	keys := []map[string]any{{"kty": "future", "kid": "k9"}}
	for kid, key := range e.keys {
		keys = append(keys, map[string]any{"kty": "RSA", "use": "sig", "kid": kid, "issuer": e.issuer,
			"n": base64.RawURLEncoding.EncodeToString(key.N.Bytes()),
			"e": base64.RawURLEncoding.EncodeToString(big.NewInt(int64(key.E)).Bytes())})
	}
	body, _ := json.Marshal(map[string]any{"keys": keys})
	return &http.Response{StatusCode: 200, Status: "200 OK", Body: io.NopCloser(bytes.NewReader(body)), Request: req}, nil
}

func (e *entra) set(change func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	change()
}

// claims are those of a daemon's token, with some changed. A nil value takes one
// away.
func claims(change ...any) jwt.MapClaims {
	now := time.Now().Unix()
	c := jwt.MapClaims{"aud": audience, "iss": "https://sts.windows.net/" + tenant + "/", "tid": tenant, "appid": daemon,
		"oid": daemonID, "sub": daemonID, "idtyp": "app", "roles": []string{"consumer"}, "ver": "1.0",
		"iat": now, "nbf": now, "exp": now + 3600}
	for i := 0; i < len(change); i += 2 {
		if change[i+1] == nil {
			delete(c, change[i].(string))
		} else {
			c[change[i].(string)] = change[i+1]
		}
	}
	return c
}

func sign(method jwt.SigningMethod, key any, kid string, c jwt.MapClaims) string {
	tok := jwt.NewWithClaims(method, c)
	tok.Header["kid"] = kid
	text, err := tok.SignedString(key)
	if err != nil {
		panic(err)
	}
	return text
}

func good(change ...any) string {
	return sign(jwt.SigningMethodRS256, makeKey(), "k1", claims(change...))
}

func newGuard(e *entra) *Guard {
	return &Guard{Tenant: tenant, Audiences: []string{audience, clientID}, Client: &http.Client{Transport: e}}
}

// call sends a request with a token, and returns what it gets.
func call(h http.Handler, authorization ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	r.Header["Authorization"] = authorization
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

var welcome = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	c, ok := From(r.Context())
	fmt.Fprint(w, c.ClientID, " ", c.ObjectID, " ", c.Roles, " ", ok)
})

func TestGuard(t *testing.T) {
	public := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: x509.MarshalPKCS1PublicKey(&makeKey().PublicKey)})
	foreign := newKey()
	synctest.Test(t, func(t *testing.T) {
		v2 := []any{"iss", "https://login.microsoftonline.com/" + tenant + "/v2.0", "aud", clientID, "appid", nil, "azp", daemon, "ver", "2.0"}
		now := time.Now().Unix()
		head, rest, _ := strings.Cut(good(), ".")
		payload, signature, _ := strings.Cut(rest, ".")
		for _, tc := range []struct {
			name   string
			token  string
			status int
			reason string // in the log
		}{
			{"good", good(), 200, ""},
			{"version 2", good(v2...), 200, ""},
			{"without idtyp", good("idtyp", nil), 200, ""},
			{"several audiences", good("aud", []string{"x", audience}), 200, ""},
			{"just not expired", good("exp", now+1), 200, ""},
			{"alg none", sign(jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, "k1", claims()), 401, "unexpected signature algorithm"},
			{"no signature", head + "." + payload + ".", 401, "signature"},
			{"HS256 with the public key", sign(jwt.SigningMethodHS256, public, "k1", claims()), 401, "unexpected signature algorithm"},
			{"RS512", sign(jwt.SigningMethodRS512, makeKey(), "k1", claims()), 401, "unexpected signature algorithm"},
			{"a foreign key with the right kid", sign(jwt.SigningMethodRS256, foreign, "k1", claims()), 401, "verify"},
			{"a foreign key with a kid of its own", sign(jwt.SigningMethodRS256, foreign, "k2", claims()), 401, `the key "k2" is not known`},
			{"no kid", sign(jwt.SigningMethodRS256, makeKey(), "", claims()), 401, "is not known"},
			{"other claims under the signature", head + "." + base64.RawURLEncoding.EncodeToString([]byte(`{}`)) + "." + signature, 401, "verify"},
			{"another issuer", good("iss", "https://sts.windows.net/"+other+"/"), 401, "iss is"},
			{"an issuer without the slash", good("iss", "https://sts.windows.net/"+tenant), 401, "iss is"},
			{"the issuer of all tenants", good("iss", "https://login.microsoftonline.com/{tenantid}/v2.0"), 401, "iss is"},
			{"another tenant", good("tid", other), 401, "tid is"},
			{"no tenant", good("tid", nil), 401, "tid is"},
			{"another audience", good("aud", "https://graph.microsoft.com"), 401, "aud is"},
			{"no audience", good("aud", nil), 401, "aud is"},
			{"a user's", good("scp", "user_impersonation"), 401, "not an application's own"},
			{"a user's by idtyp", good("idtyp", "user"), 401, "not an application's own"},
			{"somebody's subject", good("sub", "x"), 401, "not an application's own"},
			{"no object ID", good("oid", nil, "sub", nil), 401, "not an application's own"},
			{"no application", good("appid", nil), 401, "which application"},
			{"two applications", good("azp", other), 401, "which application"},
			{"expired", good("exp", now), 401, "expired"},
			{"no expiry", good("exp", nil), 401, "expired"},
			{"not yet valid", good("nbf", now+3600), 401, "before"},
			{"no JWT", "garbage", 401, "malformed"},
			{"two of three parts", head + "." + payload, 401, "malformed"},
			{"oversized", good("x", strings.Repeat("x", 20_000)), 401, "bytes"},
			{"roles that are no list", good("roles", "consumer"), 401, "roles"},
			{"another role", good("roles", []string{"reader"}), 403, `lacks the app role "consumer"`},
			{"no role", good("roles", nil), 403, `lacks the app role "consumer"`},
			{"a role in part", good("roles", []string{"consumers", "Consumer"}), 403, "lacks"},
		} {
			var log bytes.Buffer
			g := newGuard(newEntra())
			g.Logger = slog.New(slog.NewTextHandler(&log, nil))
			w := call(g.Require(Role("consumer"), welcome), "Bearer "+tc.token)
			if w.Code != tc.status || !strings.Contains(strings.ReplaceAll(log.String(), `\`, ""), tc.reason) {
				t.Errorf("%s: got %d; the log has %s", tc.name, w.Code, log.String())
			}
			challenge := w.Header().Get("WWW-Authenticate")
			want := map[int]string{200: "", 401: `Bearer realm="` + audience + `", error="invalid_token"`,
				403: `Bearer realm="` + audience + `", error="insufficient_scope", error_description="The caller lacks the app role 'consumer'."`}[tc.status]
			if !strings.HasPrefix(challenge, want) || (want == "") != (challenge == "") {
				t.Errorf("%s: the challenge is %s", tc.name, challenge)
			}
			if body := w.Body.String(); tc.status == 200 && body != daemon+" "+daemonID+" [consumer] true" ||
				tc.status == 401 && strings.Contains(body, tc.reason) || strings.Contains(log.String()+body, tc.token) {
				t.Errorf("%s: it says %s, and the log %s", tc.name, body, log.String())
			}
		}
	})
}

func TestWithoutAToken(t *testing.T) {
	h := newGuard(newEntra()).Require(Role("consumer"), welcome)
	for name, header := range map[string][]string{"none": nil, "empty": {"Bearer "}, "Basic": {"Basic " + good()},
		"two": {"Bearer " + good(), "Bearer " + good()}} {
		w := call(h, header...)
		if w.Code != 401 || w.Header().Get("WWW-Authenticate") != `Bearer realm="`+audience+`"` {
			t.Errorf("%s: got %d %v", name, w.Code, w.Header())
		}
	}
	if w := call(h, "bearer   "+good()); w.Code != 200 {
		t.Errorf("in lower case: got %d", w.Code)
	}
}

func TestRules(t *testing.T) {
	c := Caller{ClientID: daemon, ObjectID: daemonID, Roles: []string{"a"}}
	for _, tc := range []struct {
		rule Rule
		want string
	}{
		{Role("a"), ""}, {Role("b"), `the app role "b"`},
		{Callers(strings.ToUpper(daemon)), ""}, {Callers("x", daemonID), ""}, {Callers("x"), "to be on the list of callers"}, {Callers(), "to be on the list of callers"},
		{Any(Role("b"), Callers(daemon)), ""}, {Any(Role("b"), Callers("x")), `the app role "b" or to be on the list of callers`},
	} {
		if got := tc.rule(c); got != tc.want {
			t.Errorf("got %q, want %q", got, tc.want)
		}
	}
}

func TestNotSetUp(t *testing.T) {
	for want, g := range map[string]*Guard{
		"not a GUID": {Audiences: []string{"a"}}, `"common", not`: {Tenant: "common", Audiences: []string{"a"}},
		"Audiences": {Tenant: tenant}, "Audiences are": {Tenant: tenant, Audiences: []string{""}},
	} {
		func() {
			defer func() {
				if p := fmt.Sprint(recover()); !strings.Contains(p, want) {
					t.Errorf("panic %q, want %q", p, want)
				}
			}()
			g.Require(Role("a"), welcome)
		}()
	}
}

// A key that is new is asked for when the first token of it comes; one that is
// withdrawn is no good from then on.
func TestRotation(t *testing.T) {
	next := newKey()
	synctest.Test(t, func(t *testing.T) {
		e := newEntra()
		h := newGuard(e).Require(Role("consumer"), welcome)
		with := func(key *rsa.PrivateKey, kid string) int {
			return call(h, "Bearer "+sign(jwt.SigningMethodRS256, key, kid, claims())).Code
		}
		if got := with(makeKey(), "k1"); got != 200 {
			t.Fatal(got)
		}
		time.Sleep(time.Hour)
		e.set(func() { e.keys = map[string]*rsa.PrivateKey{"k2": next} })
		if got := with(makeKey(), "k1"); got != 200 {
			t.Errorf("the old key, before anybody knows: %d", got)
		}
		if got := with(next, "k2"); got != 200 {
			t.Errorf("the new key: %d", got)
		}
		if got := with(makeKey(), "k1"); got != 401 {
			t.Errorf("the withdrawn key: %d", got)
		}
	})
}

// Ten thousand tokens with key IDs that are made up cost Entra a request in half a
// minute, and no caller with a good token a wait.
func TestFloodOfKeyIDs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEntra()
		h := newGuard(e).Require(Role("consumer"), welcome)
		token := good("exp", time.Now().Add(time.Hour).Unix())
		if got := call(h, "Bearer "+token).Code; got != 200 {
			t.Fatal(got)
		}
		parts := strings.Split(good(), ".")
		for i := range 10_000 {
			head := base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, `{"alg":"RS256","kid":"x%d"}`, i))
			if got := call(h, "Bearer "+head+"."+parts[1]+"."+parts[2]).Code; got != 401 {
				t.Fatal(got)
			}
			if i%100 == 0 {
				if got := call(h, "Bearer "+token).Code; got != 200 {
					t.Fatalf("a good token got %d", got)
				}
				time.Sleep(time.Second)
			}
		}
		if e.fetches > 1+100/30+1 {
			t.Errorf("%d requests in 100 seconds", e.fetches)
		}
	})
}

// While Entra is down, tokens of known keys are good: for days, if need be. The
// first one may come while it is down; then it is good when Entra is back.
func TestEntraDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEntra()
		h := newGuard(e).Require(Role("consumer"), welcome)
		e.set(func() { e.down = true })
		if got := call(h, "Bearer "+good()).Code; got != 401 {
			t.Errorf("without keys: %d", got)
		}
		e.set(func() { e.down = false })
		time.Sleep(time.Minute)
		if got := call(h, "Bearer "+good()).Code; got != 200 {
			t.Fatalf("with keys: %d", got)
		}
		e.set(func() { e.down = true })
		for range 72 {
			time.Sleep(time.Hour)
			begin := time.Now()
			if got := call(h, "Bearer "+good()).Code; got != 200 || time.Since(begin) > 0 {
				t.Fatalf("got %d after %v", got, time.Since(begin))
			}
		}
		synctest.Wait()
		before := e.fetches
		if before < 40 {
			t.Errorf("keys that are a day old are not asked for: %d requests", before)
		}
		e.set(func() { e.down = false })
		time.Sleep(time.Minute)
		call(h, "Bearer "+good())
		synctest.Wait()
		time.Sleep(time.Hour)
		call(h, "Bearer "+good())
		if e.fetches != before+1 {
			t.Errorf("%d requests once it is back, want 1", e.fetches-before)
		}
	})
}

// A key that is published with another tenant's issuer is not for this one.
func TestKeysOfOthers(t *testing.T) {
	for issuer, want := range map[string]int{
		"": 200, "https://login.microsoftonline.com/{tenantid}/v2.0": 200,
		"https://login.microsoftonline.com/" + tenant + "/v2.0": 200, "https://login.microsoftonline.com/" + other + "/v2.0": 401,
	} {
		e := newEntra()
		e.issuer = issuer
		if got := call(newGuard(e).Require(Role("consumer"), welcome), "Bearer "+good()).Code; got != want {
			t.Errorf("%q: got %d, want %d", issuer, got, want)
		}
	}
}

// What is no set of keys changes nothing.
func TestBadKeySets(t *testing.T) {
	for name, resp := range map[string]string{"HTML": "<html>", "nothing": "{}", "no keys": `{"keys":[]}`, "an error": `500`} {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			g := &Guard{Tenant: tenant, Audiences: []string{audience}, KeysURL: "https://keys.example/", Logger: slog.New(slog.NewTextHandler(&log, nil)),
				Client: &http.Client{Transport: roundTripper(func(req *http.Request) (*http.Response, error) {
					r := &http.Response{StatusCode: 200, Body: io.NopCloser(strings.NewReader(resp)), Request: req}
					if resp == "500" {
						r.StatusCode, r.Status = 500, "500 Internal Server Error"
					}
					return r, nil
				})}}
			if got := call(g.Require(Role("consumer"), welcome), "Bearer "+good()).Code; got != 401 || !strings.Contains(log.String(), "https://keys.example/") {
				t.Errorf("got %d; the log has %s", got, log.String())
			}
		})
	}
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
