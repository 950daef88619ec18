package imdsfake_test

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/aztoso/mitoken/imdsfake"
)

func TestParseManifest(t *testing.T) {
	roles := consumer(t)
	if len(roles) != 1 || roles[0].Value != "consumer" || roles[0].DisplayName != "Consumer" || !roles[0].IsEnabled {
		t.Errorf("got %+v", roles)
	}
	if !regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`).MatchString(roles[0].ID) || roles[0].ID != consumer(t)[0].ID {
		t.Errorf("the ID is %q", roles[0].ID)
	}
	role := func(fields string) string { return `[{"allowedMemberTypes":["User"],` + fields + `}]` }
	for _, tc := range []struct {
		name string
		data string
		want string // of the error; empty if there is none
	}{
		{"with an ID", role(`"value":"a","id":"00000000-0000-0000-0000-000000000001"`), ""},
		{"no roles", `[]`, ""},
		{"no value", role(`"displayName":"a"`), "app role 0: value is empty"},
		{"space", role(`"value":"a b"`), `app role 0: value "a b" has a space`},
		{"twice", `[{"value":"a","allowedMemberTypes":["User"]},{"value":"a","allowedMemberTypes":["User"]}]`,
			`app role 1: value "a" is that of another role`},
		{"nobody", `[{"value":"a"}]`, "allowedMemberTypes is empty"},
		{"stranger", `[{"value":"a","allowedMemberTypes":["Robot"]}]`, `"Robot"`},
		{"unknown field", role(`"value":"a","isenable":true`), `unknown field "isenable"`},
		{"an object", `{"appRoles":[]}`, "cannot unmarshal object"},
		{"trailing", `[] []`, "goes on after"},
		{"nothing", ``, "EOF"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := imdsfake.ParseManifest([]byte(tc.data))
			if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

func FuzzParseManifest(f *testing.F) {
	data, err := os.ReadFile("testdata/manifest.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`[{"value":"a","allowedMemberTypes":["User"]}]`))
	f.Fuzz(func(t *testing.T, data []byte) {
		roles, err := imdsfake.ParseManifest(data)
		if err != nil {
			return
		}
		seen := map[string]bool{}
		for _, r := range roles {
			if r.Value == "" || r.ID == "" || seen[r.Value] {
				t.Errorf("got %+v", roles)
			}
			seen[r.Value] = true
		}
	})
}
