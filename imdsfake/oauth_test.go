package imdsfake_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"math/big"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/aztoso/mitoken/imdsfake"
	"github.com/golang-jwt/jwt/v5"
)

const workerID = "50000000-0000-4000-8000-000000000001"

// certificate is one that a service principal proves itself with.
func certificate(t *testing.T) (*x509.Certificate, *rsa.PrivateKey) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "worker"},
		NotBefore: time.Unix(0, 0), NotAfter: time.Date(2099, 1, 1, 0, 0, 0, 0, time.UTC)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// newWorker is a tenant with a service principal that may prove itself in each
// way, and which may consume.
func newWorker(t *testing.T) (*imdsfake.Handler, *rsa.PrivateKey) {
	cert, key := certificate(t)
	fake := newTenant(t)
	fake.ServicePrincipals = []imdsfake.ServicePrincipal{{Name: "worker", ClientID: workerID, Secret: "hunter2",
		Certificate: cert, Subject: "system:serviceaccount:default:worker"}}
	fake.Assignments = []imdsfake.Assignment{{Identity: "worker", Resource: resource, Role: "consumer"}}
	return fake, key
}

// federatedToken writes one as Kubernetes does, and returns its file.
func federatedToken(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	token, err := jwt.NewWithClaims(jwt.SigningMethodES256, jwt.MapClaims{"sub": "system:serviceaccount:default:worker",
		"aud": "api://AzureADTokenExchange", "exp": 4_000_000_000}).SignedString(key)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// credentials are azidentity's, with each way to prove oneself.
func credentials(t *testing.T, cert *x509.Certificate, key crypto.PrivateKey, o azcore.ClientOptions) map[string]azcore.TokenCredential {
	t.Helper()
	secret, err := azidentity.NewClientSecretCredential(imdsfake.DefaultTenant, workerID, "hunter2",
		&azidentity.ClientSecretCredentialOptions{ClientOptions: o})
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := azidentity.NewClientCertificateCredential(imdsfake.DefaultTenant, workerID, []*x509.Certificate{cert}, key,
		&azidentity.ClientCertificateCredentialOptions{ClientOptions: o})
	if err != nil {
		t.Fatal(err)
	}
	workload, err := azidentity.NewWorkloadIdentityCredential(&azidentity.WorkloadIdentityCredentialOptions{ClientOptions: o,
		ClientID: workerID, TenantID: imdsfake.DefaultTenant, TokenFilePath: federatedToken(t)})
	if err != nil {
		t.Fatal(err)
	}
	return map[string]azcore.TokenCredential{"1 by a secret": secret, "2 by a certificate": certificate, "2 by a federated token": workload}
}

// azidentity's credentials get tokens from the fake in the place of Entra: at its
// own name, and at that of another authority.
func TestServicePrincipals(t *testing.T) {
	fake, key := newWorker(t)
	srv := imdsfake.NewServer(fake)
	defer srv.Close()
	other := azcore.ClientOptions{Transport: srv.Client(), Cloud: cloud.Configuration{ActiveDirectoryAuthorityHost: srv.TLSURL()}}
	for name, o := range map[string]azcore.ClientOptions{
		"login.microsoftonline.com": {Transport: srv.Client()},
		"another authority":         other,
	} {
		for proof, cred := range credentials(t, fake.ServicePrincipals[0].Certificate, key, o) {
			t.Run(name+" "+proof, func(t *testing.T) {
				tok, err := cred.GetToken(t.Context(), policy.TokenRequestOptions{Scopes: []string{resource + "/.default"}})
				if err != nil {
					t.Fatal(err)
				}
				claims := verify(t, fake, fake.Issuer(), tok.Token, resource)
				if claims["appid"] != workerID || claims["appidacr"] != proof[:1] || claims["xms_mirid"] != nil || fmt.Sprint(claims["roles"]) != "[consumer]" {
					t.Errorf("the claims are %v", claims)
				}
				if left := time.Until(tok.ExpiresOn); left < 59*time.Minute || left > time.Hour {
					t.Errorf("it lives %v", left)
				}
			})
		}
	}
	for _, r := range fake.Requests() {
		if strings.Contains(fmt.Sprintf("%+v", r), "hunter2") {
			t.Errorf("the journal has the secret: %+v", r)
		}
	}
	if text, err := json.Marshal(fake.Directory()); err != nil || strings.Contains(string(text), "hunter2") {
		t.Errorf("the directory has the secret: %s", text)
	}
}

func TestTokenEndpointRefuses(t *testing.T) {
	fake, key := newWorker(t)
	fake.ServicePrincipals = append(fake.ServicePrincipals, imdsfake.ServicePrincipal{Name: "plain"})
	plainID := fake.Directory().ServicePrincipals[1].ClientID
	sign := func(claims jwt.MapClaims, header map[string]any) string {
		tok := jwt.NewWithClaims(jwt.SigningMethodPS256, claims)
		for name, value := range header {
			tok.Header[name] = value
		}
		text, err := tok.SignedString(key)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	thumbprint := map[string]any{"x5t": strings.ToUpper(fmt.Sprintf("%x", sha1.Sum(fake.ServicePrincipals[0].Certificate.Raw)))}
	good := func() jwt.MapClaims {
		return jwt.MapClaims{"iss": workerID, "sub": workerID, "exp": time.Now().Add(time.Minute).Unix(),
			"aud": "https://login.microsoftonline.com/" + imdsfake.DefaultTenant + "/oauth2/v2.0/token"}
	}
	with := func(name string, value any) jwt.MapClaims {
		c := good()
		c[name] = value
		return c
	}
	form := func(change ...string) url.Values {
		f := url.Values{"grant_type": {"client_credentials"}, "client_id": {workerID}, "client_secret": {"hunter2"}, "scope": {resource + "/.default"}}
		for i := 0; i < len(change); i += 2 {
			f.Set(change[i], change[i+1])
		}
		return f
	}
	assertion := func(text string) url.Values {
		return form("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer", "client_assertion", text)
	}
	federated := func(claims jwt.MapClaims) url.Values {
		claims["sub"] = "system:serviceaccount:default:worker"
		return assertion(sign(claims, nil))
	}
	twice := form()
	twice.Add("scope", "x")
	for _, tc := range []struct {
		name   string
		path   string
		form   url.Values
		status int
		code   string
		text   string
	}{
		{"right", "", form(), 200, "", ""},
		{"an assertion that is right", "", assertion(sign(good(), thumbprint)), 200, "", ""},
		{"secret", "", form("client_secret", "guess"), 401, "invalid_client", "AADSTS7000215"},
		{"no secret is known", "", form("client_id", plainID, "client_secret", ""), 401, "invalid_client", "AADSTS7000215"},
		{"client", "", form("client_id", "nobody"), 400, "unauthorized_client", "AADSTS700016"},
		{"grant", "", form("grant_type", "password"), 400, "unsupported_grant_type", "AADSTS70003"},
		{"scope", "", form("scope", resource), 400, "invalid_scope", "AADSTS1002012"},
		{"resource", "", form("scope", "https://other/.default"), 400, "invalid_resource", "AADSTS500011"},
		{"twice", "", twice, 400, "invalid_request", "AADSTS900144"},
		{"no tenant", "/common/oauth2/v2.0/token", form(), 400, "invalid_request", "AADSTS50059"},
		{"no JWT", "", assertion("x"), 401, "invalid_client", "no JSON Web Token"},
		{"no certificate", "", func() url.Values { f := assertion(sign(good(), thumbprint)); f.Set("client_id", plainID); return f }(), 401, "invalid_client", "has no certificate"},
		{"another key", "", assertion(sign(good(), map[string]any{"x5t": "x"})), 401, "invalid_client", "thumbprint"},
		{"another audience", "", assertion(sign(with("aud", "https://example.com"), thumbprint)), 401, "invalid_client", "audience"},
		{"another issuer", "", assertion(sign(with("iss", "x"), thumbprint)), 401, "invalid_client", "issuer"},
		{"a federated token", "", federated(jwt.MapClaims{"aud": "api://AzureADTokenExchange", "exp": 4_000_000_000}), 200, "", ""},
		{"a federated token for others", "", federated(jwt.MapClaims{"aud": "x", "exp": 4_000_000_000}), 401, "invalid_client", "audience"},
		{"an old federated token", "", federated(jwt.MapClaims{"aud": "api://AzureADTokenExchange", "exp": 1}), 401, "invalid_client", "expired"},
		{"expired", "", assertion(sign(with("exp", 1), thumbprint)), 401, "invalid_client", "expired"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := tc.path
			if path == "" {
				path = "/" + imdsfake.DefaultTenant + "/oauth2/v2.0/token"
			}
			resp, err := (&http.Client{Transport: fake}).PostForm("https://login.microsoftonline.com"+path, tc.form)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			var a struct {
				Error       string `json:"error"`
				Description string `json:"error_description"`
				Codes       []int  `json:"error_codes"`
				Token       string `json:"access_token"`
			}
			if err := json.NewDecoder(resp.Body).Decode(&a); err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode != tc.status || a.Error != tc.code || !strings.Contains(a.Description, tc.text) || (a.Token != "") != (tc.status == 200) {
				t.Errorf("got %s %+v, want %d %s %s", resp.Status, a, tc.status, tc.code, tc.text)
			}
			if strings.HasPrefix(tc.text, "AADSTS") && tc.path == "" && (len(a.Codes) != 1 || fmt.Sprint("AADSTS", a.Codes[0]) != tc.text) {
				t.Errorf("error_codes is %v", a.Codes)
			}
		})
	}
}

// Faults befall the token endpoint, too, and azidentity's policy retries them.
func TestEntraFails(t *testing.T) {
	fake, key := newWorker(t)
	creds := credentials(t, fake.ServicePrincipals[0].Certificate, key, azcore.ClientOptions{Transport: &http.Client{Transport: fake}})
	synctest.Test(t, func(t *testing.T) {
		fake.Inject(imdsfake.Fault{Status: 503, Times: 2, Identity: "worker"}, imdsfake.Fault{Status: 500, Identity: "host"})
		for _, cred := range creds {
			if _, err := cred.GetToken(context.Background(), policy.TokenRequestOptions{Scopes: []string{resource + "/.default"}}); err != nil {
				t.Error(err)
			}
		}
		if left := fake.Faults(); len(left) != 1 {
			t.Errorf("left are %v", left)
		}
	})
}
