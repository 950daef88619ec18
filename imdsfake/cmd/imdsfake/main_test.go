package main

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The line that it says to try works.
func TestServe(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, w := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, []string{"-addr", "127.0.0.1:0", "-manifest", "../../testdata/manifest.json"}, w)
		w.Close()
	}()
	var line, all string
	for lines := bufio.NewScanner(r); lines.Scan(); {
		line = lines.Text()
		all += line + "\n"
		if strings.HasPrefix(line, "curl ") {
			break
		}
	}
	for _, want := range []string{"consumer", "https://myapp.aztoso.com", "client_id=da000000", "/discovery/keys"} {
		if !strings.Contains(all, want) {
			t.Errorf("it does not say %q:\n%s", want, all)
		}
	}
	_, target, _ := strings.Cut(line, "'")
	req, err := http.NewRequest("GET", strings.TrimSuffix(target, "'"), nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Metadata", "true")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != 200 || !strings.Contains(string(body), "access_token") {
		t.Errorf("got %s %s", resp.Status, body)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("it ended with %v", err)
	}
}

func TestMistakes(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "manifest.json")
	if err := os.WriteFile(bad, []byte(`[{"value":""}]`), 0o600); err != nil {
		t.Fatal(err)
	}
	for want, args := range map[string][]string{
		"argument too many":      {"x"},
		"less than a second":     {"-lifetime", "1ms"},
		"invalid value":          {"-lifetime", "long"},
		"no such file":           {"-manifest", "nowhere.json"},
		"value is empty":         {"-manifest", bad},
		"-addr":                  {"-addr", "127.0.0.1:99999"},
		"flag provided but not":  {"-x"},
		"flag: help requested":   {"-h"},
		"-manifest: imdsfake: m": {"-manifest", bad},
	} {
		if err := run(t.Context(), args, io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", args, err, want)
		}
	}
}
