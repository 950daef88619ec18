package imdsfake_test

import (
	"io"
	"testing"

	"github.com/aztoso/mitoken/imdsfake"
)

// How many requests a second one goroutine makes of the fake, and how many all
// cores do.
func BenchmarkToken(b *testing.B) {
	for _, bc := range []struct {
		name string
		fake *imdsfake.Handler
	}{
		{"from the cache", new(imdsfake.Handler)},
		{"new", &imdsfake.Handler{Cache: imdsfake.NoCache}},
	} {
		ask := func() {
			resp, err := bc.fake.RoundTrip(newRequest(plain))
			if err != nil {
				b.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, resp.Body)
		}
		b.Run(bc.name, func(b *testing.B) {
			ask() // which makes the key
			for b.Loop() {
				ask()
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "requests/s")
		})
		b.Run(bc.name+", all cores", func(b *testing.B) {
			ask()
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					ask()
				}
			})
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "requests/s")
		})
	}
}
