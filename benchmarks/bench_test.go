// Package benchmarks measures mitoken beside its peers, in one run:
//
//	cd benchmarks && go test -bench . -count 5
//
// Figures of one machine say little; the ratios within a run are the point.
package benchmarks

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/aztoso/mitoken"
	"golang.org/x/oauth2"
)

const resource = "https://service.example"

var scope = policy.TokenRequestOptions{Scopes: []string{resource + "/.default"}}

// imds answers each request for a token, as the metadata service does.
type imds struct{}

func (imds) RoundTrip(req *http.Request) (*http.Response, error) {
	now := time.Now().Unix()
	body := fmt.Sprintf(`{"access_token":%q,"expires_in":"86400","expires_on":"%d","resource":%q,"token_type":"Bearer"}`,
		strings.Repeat("x", 1500), now+86400, req.URL.Query().Get("resource"))
	return &http.Response{
		StatusCode: http.StatusOK,
		Header:     http.Header{"Content-Type": {"application/json"}},
		Body:       io.NopCloser(strings.NewReader(body)),
		Request:    req,
	}, nil
}

func newSource(b *testing.B) (*mitoken.Credential, *mitoken.TokenSource) {
	cred := &mitoken.Credential{IMDSTransport: imds{}}
	b.Cleanup(func() { cred.Close() })
	src := cred.TokenSource(resource)
	if _, err := src.Token(); err != nil {
		b.Fatal(err)
	}
	return cred, src
}

func newAzidentity(b *testing.B) *azidentity.ManagedIdentityCredential {
	cred, err := azidentity.NewManagedIdentityCredential(&azidentity.ManagedIdentityCredentialOptions{
		ClientOptions: azcore.ClientOptions{Transport: &http.Client{Transport: imds{}}},
	})
	if err != nil {
		b.Fatal(err)
	}
	return cred
}

// BenchmarkToken is the cost of a cached token. The floor is what a cache that
// looks at the clock cannot do without.
func BenchmarkToken(b *testing.B) {
	cred, src := newSource(b)
	var floor atomic.Pointer[oauth2.Token]
	tok, _ := src.Token()
	floor.Store(tok)
	reuse := oauth2.ReuseTokenSource(nil, src)
	azid := newAzidentity(b)
	for _, bench := range []struct {
		name string
		get  func(context.Context) error
	}{
		{"floor", func(context.Context) error {
			if !time.Now().Before(floor.Load().Expiry) {
				return context.DeadlineExceeded
			}
			return nil
		}},
		{"mitoken.Token", func(context.Context) error { _, err := src.Token(); return err }},
		{"mitoken.TokenContext", func(ctx context.Context) error { _, err := src.TokenContext(ctx); return err }},
		{"mitoken.GetToken", func(ctx context.Context) error { _, err := cred.GetToken(ctx, scope); return err }},
		{"oauth2.ReuseTokenSource", func(context.Context) error { _, err := reuse.Token(); return err }},
		{"azidentity", func(ctx context.Context) error { _, err := azid.GetToken(ctx, scope); return err }},
	} {
		for _, goroutines := range []int{1, 64} {
			b.Run(fmt.Sprintf("%s/goroutines=%d", bench.name, goroutines), func(b *testing.B) {
				b.ReportAllocs()
				run(b, goroutines, bench.get)
			})
		}
	}
}

// run calls get from one goroutine, or from many for each CPU.
func run(b *testing.B, goroutines int, get func(context.Context) error) {
	ctx := b.Context()
	if goroutines == 1 {
		for b.Loop() {
			if err := get(ctx); err != nil {
				b.Fatal(err)
			}
		}
		return
	}
	b.SetParallelism(goroutines)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := get(ctx); err != nil {
				b.Error(err)
			}
		}
	})
}

// sink is a service that costs nothing.
type sink struct{ resp *http.Response }

func (s sink) RoundTrip(*http.Request) (*http.Response, error) { return s.resp, nil }

// BenchmarkRoundTrip is the cost of attaching a cached token to a request with
// five headers.
func BenchmarkRoundTrip(b *testing.B) {
	_, src := newSource(b)
	base := sink{&http.Response{StatusCode: http.StatusOK, Body: http.NoBody}}
	req, err := http.NewRequest(http.MethodGet, resource+"/orders", nil)
	if err != nil {
		b.Fatal(err)
	}
	for _, name := range []string{"Accept", "Content-Type", "Traceparent", "User-Agent", "X-Request-Id"} {
		req.Header.Set(name, "value")
	}
	for _, bench := range []struct {
		name string
		rt   http.RoundTripper
	}{
		{"mitoken", &mitoken.Transport{Source: src, Base: base}},
		{"oauth2", &oauth2.Transport{Source: oauth2.ReuseTokenSource(nil, src), Base: base}},
	} {
		b.Run(bench.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := bench.rt.RoundTrip(req); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
