package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/aztoso/mitoken"
	"github.com/aztoso/mitoken/imdsfake"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The daemon starts, calls the service with a token, is healthy, and stops when it
// is told to.
func TestDaemon(t *testing.T) {
	azure := imdsfake.NewServer(nil)
	defer azure.Close()
	called := make(chan string, 100)
	service := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		called <- r.Header.Get("Authorization")
	}))
	defer service.Close()

	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	logs, w := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, []string{"-resource", "api://orders", "-url", service.URL + "/orders", "-imds", azure.URL, "-listen", "127.0.0.1:0"}, w)
		w.Close()
	}()
	lines := bufio.NewScanner(logs)
	records := map[any]map[string]any{}
	said := func(msg string) map[string]any { // in whatever order
		t.Helper()
		for records[msg] == nil {
			if !lines.Scan() {
				t.Fatalf("the log ends without %q", msg)
			}
			var record map[string]any
			if err := json.Unmarshal(lines.Bytes(), &record); err != nil {
				t.Fatalf("%v: %s", err, lines.Text())
			}
			records[record["msg"]] = record
		}
		return records[msg]
	}
	url := said("started")["health"].(string)
	if got := said("mitoken: tokens are issued"); got["source"] != "imds" || got["resource"] != "api://orders" {
		t.Errorf("the log has %v", got)
	}
	if got := <-called; strings.Count(got, ".") != 2 || !strings.HasPrefix(got, "Bearer ") {
		t.Errorf("the service got %q", got)
	}
	if got := said("called"); got["status"] != 200. {
		t.Errorf("the log has %v", got)
	}
	var status mitoken.Status
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	err = json.NewDecoder(resp.Body).Decode(&status)
	resp.Body.Close()
	if err != nil || resp.StatusCode != 200 || status.State != "fresh" || status.Source != "imds" {
		t.Errorf("it is %s: %+v, %v", resp.Status, status, err)
	}
	http.DefaultClient.CloseIdleConnections()
	stop()
	said("stopped")
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// Without a token, it is not healthy.
func TestUnhealthy(t *testing.T) {
	var cred mitoken.Credential
	defer cred.Close()
	w := httptest.NewRecorder()
	healthHandler(cred.TokenSource("api://orders")).ServeHTTP(w, httptest.NewRequest("GET", "/healthz", nil))
	if w.Code != http.StatusServiceUnavailable || !strings.Contains(w.Body.String(), `"state":"empty"`) {
		t.Errorf("got %d %s", w.Code, w.Body)
	}
}

func TestMistakes(t *testing.T) {
	for want, args := range map[string][]string{
		"-resource is missing":  nil,
		"argument too many":     {"-resource", "r", "x"},
		"less than a second":    {"-resource", "https://r", "-every", "1ms"},
		`-url "orders"`:         {"-resource", "r", "-url", "orders"},
		"-listen":               {"-resource", "https://r", "-listen", "127.0.0.1:99999"},
		"flag provided but not": {"-x"},
	} {
		if err := run(t.Context(), args, io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %s", args, err, want)
		}
	}
	if err := run(t.Context(), []string{"-h"}, io.Discard); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("got %v", err)
	}
}
