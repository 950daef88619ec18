package benchmarks

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/aztoso/mitoken"
	"github.com/aztoso/mitoken/imdsfake"
	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
)

// otelhttp goes above a Transport and below it: the service gets the token and the
// trace, and the trace has the request, but no token.
func TestWithOtelhttp(t *testing.T) {
	cred := &mitoken.Credential{IMDSTransport: new(imdsfake.Handler)}
	defer cred.Close()
	src := cred.TokenSource("https://x.example")
	tok, err := src.Token()
	if err != nil {
		t.Fatal(err)
	}
	service := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer "+tok.AccessToken || r.Header.Get("Traceparent") == "" {
			t.Errorf("the service got %d characters of a token, and the trace %q", len(r.Header.Get("Authorization")), r.Header.Get("Traceparent"))
		}
		_, _ = io.Copy(w, r.Body)
	}))
	defer service.Close()
	for _, above := range []bool{true, false} {
		spans := tracetest.NewSpanRecorder()
		provider := trace.NewTracerProvider(trace.WithSpanProcessor(spans))
		options := []otelhttp.Option{otelhttp.WithTracerProvider(provider), otelhttp.WithPropagators(propagation.TraceContext{})}
		base := service.Client().Transport
		if !above {
			base = otelhttp.NewTransport(base, options...)
		}
		var rt http.RoundTripper = &mitoken.Transport{Source: src, Base: base, Origins: []string{service.URL}}
		if above {
			rt = otelhttp.NewTransport(rt, options...)
		}
		resp, err := (&http.Client{Transport: rt}).Post(service.URL, "text/plain", strings.NewReader("body"))
		if err != nil {
			t.Fatal(err)
		}
		if body, err := io.ReadAll(resp.Body); string(body) != "body" || err != nil {
			t.Errorf("got %s, %v", body, err)
		}
		resp.Body.Close()
		ended := spans.Ended()
		if len(ended) != 1 {
			t.Fatalf("above=%v: %d spans", above, len(ended))
		}
		for _, a := range append(ended[0].Attributes(), attribute.String("name", ended[0].Name())) {
			if strings.Contains(a.Value.String(), tok.AccessToken) {
				t.Errorf("the token is in %s", a.Key)
			}
		}
	}
}
