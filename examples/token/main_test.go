package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/aztoso/mitoken/imdsfake"
)

const (
	resource   = "https://myapp.aztoso.com"
	clientID   = "2a4c6e80-1b3d-4f57-9a8c-0e1d2c3b4a59"
	objectID   = "3b5d7f91-2c4e-4a68-8b0d-1f2e3d4c5b6a"
	resourceID = "/subscriptions/4c6e8a02-3d5f-4b79-9c1e-2a3f4e5d6c7b/resourcegroups/rg" +
		"/providers/Microsoft.ManagedIdentity/userAssignedIdentities/worker"
)

// newFake starts a metadata service for the default identity, which may be a
// consumer, and for one that is user-assigned. It returns its endpoint.
func newFake(t *testing.T) (endpoint string) {
	t.Helper()
	roles, err := imdsfake.ParseManifest([]byte(`[{
		"allowedMemberTypes": ["Application"], "description": "Consumers can use the service",
		"displayName": "Consumer", "isEnabled": true, "value": "consumer"}]`))
	if err != nil {
		t.Fatal(err)
	}
	s := imdsfake.NewServer(&imdsfake.Handler{
		Identities: []imdsfake.Identity{
			{Name: "host", SystemAssigned: true},
			{Name: "worker", ClientID: clientID, ObjectID: objectID, ResourceID: resourceID},
		},
		Apps:        []imdsfake.App{{URI: resource, Roles: roles}},
		Assignments: []imdsfake.Assignment{{Identity: "host", Resource: resource, Role: "consumer"}},
	})
	t.Cleanup(s.Close)
	return s.URL
}

// check runs the program, and checks its exit code, and that an error is one
// line and alone. It returns what the program printed.
func check(t *testing.T, want int, args ...string) (stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	if got := run(t.Context(), args, &out, &errs); got != want {
		t.Fatalf("exit code %d, want %d; stderr: %s", got, want, errs.String())
	}
	if want == 0 && errs.Len() > 0 {
		t.Errorf("stderr: %q, want none", errs.String())
	}
	if want != 0 && (out.Len() > 0 || strings.Count(errs.String(), "\n") != 1) {
		t.Errorf("stdout: %q, want none; stderr: %q, want one line", out.String(), errs.String())
	}
	return out.String(), errs.String()
}

func TestToken(t *testing.T) {
	out, _ := check(t, 0, "-resource", resource, "-endpoint", newFake(t))
	token, ok := strings.CutSuffix(out, "\n")
	if !ok || strings.ContainsAny(token, " \n") || strings.Count(token, ".") != 2 {
		t.Error("the output is not a JWT and a newline")
	}
}

func TestClaims(t *testing.T) {
	endpoint := newFake(t)
	for _, tc := range []struct {
		name, flag, id string
		appid          string
		roles          int
	}{
		{"default", "-timeout", "30s", "", 1},
		{"client ID", "-client-id", clientID, clientID, 0},
		{"object ID", "-object-id", objectID, clientID, 0},
		{"resource ID", "-resource-id", resourceID, clientID, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			out, _ := check(t, 0, "-resource", resource, "-endpoint", endpoint, "-claims", tc.flag, tc.id)
			var c struct {
				Audience  string   `json:"aud"`
				AppID     string   `json:"appid"`
				Roles     []string `json:"roles"`
				Expiry    int64    `json:"exp"`
				ExpiryUTC string   `json:"exp_utc"`
			}
			if err := json.Unmarshal([]byte(out), &c); err != nil {
				t.Fatal(err)
			}
			if c.Audience != resource || len(c.Roles) != tc.roles {
				t.Errorf("aud %q, roles %q, want %q and %d roles", c.Audience, c.Roles, resource, tc.roles)
			}
			if tc.appid != "" && c.AppID != tc.appid {
				t.Errorf("appid %q, want %q", c.AppID, tc.appid)
			}
			if want := time.Unix(c.Expiry, 0).UTC().Format(time.RFC3339); c.ExpiryUTC != want {
				t.Errorf("exp_utc %q, want %q", c.ExpiryUTC, want)
			}
			if !strings.HasPrefix(out, "{\n  \"") || strings.Contains(out, "e+") {
				t.Errorf("not indented, or with a number that nobody can read:\n%s", out)
			}
		})
	}
}

func TestOpaqueToken(t *testing.T) {
	h := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(`{"access_token":"opaque","expires_on":"4102444800"}`))
	}
	s := httptest.NewServer(http.HandlerFunc(h))
	defer s.Close()
	if out, _ := check(t, 0, "-resource", resource, "-endpoint", s.URL); out != "opaque\n" {
		t.Errorf("got %q, want the token", out)
	}
	_, msg := check(t, 1, "-resource", resource, "-endpoint", s.URL, "-claims")
	if msg != errOpaque.Error()+"\n" {
		t.Errorf("got %q, want %q", msg, errOpaque)
	}
}

func TestFailures(t *testing.T) {
	endpoint, nobody := newFake(t), unusedEndpoint(t)
	stranger := "11111111-2222-3333-4444-555555555555"
	for _, tc := range []struct {
		name string
		code int
		want string // in the error
		args []string
	}{
		{"no flags", 2, "-resource is missing", nil},
		{"unknown flag", 2, "-scope", []string{"-scope", resource}},
		{"argument", 2, "unexpected argument", []string{"-resource", resource, "now"}},
		{"two identities", 2, "one of",
			[]string{"-resource", resource, "-client-id", clientID, "-object-id", objectID}},
		{"no time", 2, "-timeout", []string{"-resource", resource, "-timeout", "0s"}},
		{"scope", 1, "is a scope", []string{"-resource", resource + "/.default"}},
		{"empty identity", 1, "is empty", []string{"-resource", resource, "-client-id", ""}},
		{"endpoint off the host", 1, "neither https nor", []string{"-resource", resource,
			"-endpoint", "http://192.0.2.1"}},
		{"unknown identity", 1, "400", []string{"-resource", resource,
			"-endpoint", endpoint, "-client-id", stranger}},
		{"unknown resource", 1, "400", []string{"-resource", "https://nobody.aztoso.com",
			"-endpoint", endpoint}},
		{"nothing listens", 1, "refused", []string{"-resource", resource,
			"-endpoint", nobody, "-timeout", "1s"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, msg := check(t, tc.code, tc.args...); !strings.Contains(msg, tc.want) {
				t.Errorf("got %q, want %q in it", msg, tc.want)
			}
		})
	}
}

// unusedEndpoint returns an endpoint at which nothing listens.
func unusedEndpoint(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return "http://" + l.Addr().String()
}

func TestInterrupt(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	var out, errs bytes.Buffer
	start := time.Now()
	code := run(ctx, []string{"-resource", resource, "-endpoint", unusedEndpoint(t)}, &out, &errs)
	if took := time.Since(start); code != 1 || took > 5*time.Second {
		t.Errorf("exit code %d after %v, want 1 at once", code, took)
	}
}

func TestHelp(t *testing.T) {
	if out, _ := check(t, 0, "-h"); !strings.Contains(out, "-resource") {
		t.Errorf("got %q, want the flags", out)
	}
}
