package imdsfake_test

import (
	"io"
	"net/http"
	"strings"
	"testing"
)

func TestInstance(t *testing.T) {
	without := func(r *http.Request) { r.Header.Del("Metadata") }
	proxied := func(r *http.Request) { r.Header.Set("X-Forwarded-For", "10.0.0.1") }
	post := func(r *http.Request) { r.Method = "POST" }
	keep := func(*http.Request) {}
	for _, tc := range []struct {
		target string
		change func(*http.Request)
		status int
		want   string // in the body
	}{
		{"instance?api-version=2021-02-01", keep, 200, `"azEnvironment":"AzurePublicCloud"`},
		{"instance/?api-version=2021-02-01", keep, 200, `"macAddress"`},
		{"instance/compute?api-version=2021-02-01", keep, 200, `"name":"host"`},
		{"instance/compute/location?api-version=2020-06-01&format=text", keep, 200, `westeurope`},
		{"instance/compute/location?api-version=2020-06-01&format=json", keep, 200, `"westeurope"`},
		{"instance/network/interface/0/macAddress?api-version=2021-02-01&format=text", keep, 200, "000D3A000001"},
		{"versions", keep, 200, `"apiVersions":["2023-`},
		{"instance", keep, 400, `"newest-versions":["2023-`},
		{"instance?api-version=latest", keep, 400, `api-version was not specified`},
		{"instance?api-version=2021-02-01", without, 400, `{"error":"Bad request. Required metadata header not specified"}`},
		{"instance?api-version=2021-02-01", proxied, 400, `X-Forwarded-For`},
		{"instance?api-version=2021-02-01", post, 405, `Method not allowed`},
		{"instance/compute?api-version=2021-02-01&format=text", keep, 400, `single value`},
		{"instance/nothing?api-version=2021-02-01", keep, 404, `Not found`},
		{"instance/compute/name/x?api-version=2021-02-01", keep, 404, `Not found`},
		{"instance/network/interface/1?api-version=2021-02-01", keep, 404, `Not found`},
		{"instances?api-version=2021-02-01", keep, 404, `Not found`},
		{"attested/document?api-version=2021-02-01", keep, 404, `Not found`},
		{"identity/oauth2/tokens?api-version=2018-02-01", keep, 401, `Unknown Source http://169.254.169.254/metadata/identity/oauth2/tokens`},
	} {
		t.Run(tc.target, func(t *testing.T) {
			req := newRequestTo("GET", "http://169.254.169.254/metadata/"+tc.target)
			tc.change(req)
			resp, err := newTenant(t).RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(resp.Body)
			if resp.StatusCode != tc.status || !strings.Contains(string(body), tc.want) {
				t.Errorf("got %s %s, want %d %s", resp.Status, body, tc.status, tc.want)
			}
			kind, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
			if text := tc.status == 200 && strings.HasSuffix(tc.target, "format=text"); (kind == "text/plain") != text {
				t.Errorf("Content-Type is %s", kind)
			}
		})
	}
}
