package mitoken

import (
	"net/http"
	"testing"
)

func TestRefusesToken(t *testing.T) {
	for _, tc := range []struct {
		name   string
		header []string
		want   bool
	}{
		{"as Entra's services have it", []string{`Bearer realm="x", error="invalid_token", error_description="The token expired at '11/23/2026'"`}, true},
		{"unquoted", []string{`Bearer error=invalid_token`}, true},
		{"upper case", []string{`BEARER ERROR="invalid_token"`}, true},
		{"odd spaces", []string{"  Bearer\trealm = \"a\" ,error\t=\t\"invalid_token\""}, true},
		{"second challenge", []string{`Basic realm="b", Bearer error="invalid_token"`}, true},
		{"second header", []string{`Basic realm="b"`, `Bearer error="invalid_token"`}, true},
		{"after a token68", []string{`Negotiate YII=, Bearer error="invalid_token"`}, true},
		{"nothing", nil, false},
		{"no error", []string{`Bearer realm="x"`}, false},
		{"another error", []string{`Bearer error="insufficient_scope"`}, false},
		{"another scheme's error", []string{`Digest error="invalid_token"`}, false},
		{"another scheme's error after Bearer", []string{`Bearer realm="x", Digest error="invalid_token"`}, false},
		{"in a description", []string{`Bearer error_description="error=\"invalid_token\"", error="other"`}, false},
		{"in a quoted comma", []string{`Bearer realm="a, error=invalid_token"`}, false},
		{"an escaped quote", []string{`Bearer realm="a\", error=invalid_token"`}, false},
		{"a quote that does not end", []string{`Bearer realm="a, error=invalid_token`}, false},
		{"garbage", []string{`"=,=="\`}, false},
	} {
		if got := refusesToken(http.Header{"Www-Authenticate": tc.header}); got != tc.want {
			t.Errorf("%s: got %v, want %v", tc.name, got, tc.want)
		}
	}
}

func FuzzRefusesToken(f *testing.F) {
	f.Add(`Bearer realm="x", error="invalid_token"`)
	f.Add(`Negotiate YII=, Bearer error=invalid_token`)
	f.Add(`"\"=,`)
	f.Fuzz(func(t *testing.T, value string) {
		// It ends, whatever the header. And a challenge of its own in front of it is
		// found, whatever comes after.
		refusesToken(http.Header{"Www-Authenticate": {value}})
		if !refusesToken(http.Header{"Www-Authenticate": {`Bearer error="invalid_token", ` + value}}) {
			t.Error("a challenge was overlooked")
		}
	})
}
