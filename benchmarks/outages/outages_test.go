package main

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/aztoso/mitoken/imdsfake"
)

// What the table shows is so: an outage of 12 hours, at whatever time, is felt by
// nobody who uses mitoken, and by all the others if it is at the end of a token.
func TestOutageOfTwelveHours(t *testing.T) {
	refuse := imdsfake.Fault{Failure: imdsfake.Refuse}
	for _, c := range contestants {
		t.Run(c.name, func(t *testing.T) {
			for start := every / 2; start < day; start += 3 * time.Hour {
				synctest.Test(t, func(t *testing.T) {
					failed, longest := suffer(t, c, refuse, start, 12*time.Hour)
					if ours := c.name == "mitoken"; ours && (failed > 0 || longest > 0) {
						t.Errorf("start %v: %d calls failed, the longest took %v", start, failed, longest)
					} else if !ours && start > day/2 && failed == 0 {
						t.Errorf("start %v: no call failed: the table is out of date", start)
					}
				})
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
