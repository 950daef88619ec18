package main

import (
	"testing"
	"time"

	"github.com/aztoso/mitoken/imdsfake"
)

// What the tables show is so: outages of up to 12 hours, at whatever time, are felt
// by nobody who uses mitoken, and by all the others at the end of a token.
func TestOutages(t *testing.T) {
	refuse := imdsfake.Fault{Failure: imdsfake.Refuse}
	for _, c := range contestants {
		t.Run(c.name, func(t *testing.T) {
			for _, length := range lengths {
				r := c.try(t, refuse, 3*time.Hour, length)
				switch {
				case c.name == "mitoken":
					if r.felt > 0 || r.failed > 0 || r.longest > 0 {
						t.Errorf("%v: %d of %d felt; %s", length, r.felt, r.outages, r.worst())
					}
				case r.failed == 0:
					t.Errorf("%v: no call failed: the tables are out of date", length)
				}
			}
		})
	}
}

func TestShort(t *testing.T) {
	for d, want := range map[time.Duration]string{
		time.Minute: "1m", 10 * time.Minute: "10m", 6 * time.Hour: "6h", 90 * time.Minute: "1h30m",
		0: "0s", 30 * time.Second: "30s", 90 * time.Second: "1m30s",
	} {
		if got := short(d); got != want {
			t.Errorf("short(%v) = %s, want %s", d, got, want)
		}
	}
}
