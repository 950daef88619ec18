package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"io"
	"net/http"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// What it says to try has the answers that it says, with curl where there is one.
func TestServe(t *testing.T) {
	for _, tool := range []string{"curl", "jq", "sh"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip("what it says to try needs ", tool)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, w := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, []string{"-addr", "127.0.0.1:0", "-allow", "somebody"}, w)
		w.Close()
	}()
	lines := bufio.NewScanner(r)
	var said []string
	for lines.Scan() {
		said = append(said, lines.Text())
		if strings.Contains(lines.Text(), "as nobody") {
			lines.Scan()
			said = append(said, lines.Text())
			break
		}
	}
	go io.Copy(io.Discard, r) // its log
	tried := 0
	for i, line := range said {
		m := regexp.MustCompile(`: (\d+)$`).FindStringSubmatch(line)
		if m == nil {
			continue
		}
		tried++
		out, err := exec.Command("sh", "-c", said[i+1]).CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("HTTP/1.1 "+m[1])) || m[1] == "401" && !bytes.Contains(out, []byte("\r\nWww-Authenticate: Bearer realm=")) {
			t.Errorf("%s\n%s\n%v", said[i+1], out, err)
		}
	}
	if tried != 3 {
		t.Errorf("it says %q", said)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	http.DefaultClient.CloseIdleConnections()
}

func TestMistakes(t *testing.T) {
	for want, args := range map[string][]string{
		"argument too many":     {"x"},
		"-addr":                 {"-addr", "127.0.0.1:99999"},
		"not a GUID":            {"-addr", "127.0.0.1:0", "-tenant", "common"},
		"called in tokens":      {"-addr", "127.0.0.1:0", "-tenant", guest, "-audience", ""},
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
