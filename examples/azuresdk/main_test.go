package main

import (
	"bytes"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestDemo(t *testing.T) {
	var out bytes.Buffer
	if err := run(t.Context(), nil, &out); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 4 || lines[0] != "the secret greeting has 12 characters" || lines[2] != lines[0] ||
		!strings.HasPrefix(lines[3], "this would go on for 23h59m") && !strings.HasPrefix(lines[3], "this would go on for 24h") {
		t.Errorf("it said %q", lines)
	}
}

func TestMistakes(t *testing.T) {
	for want, args := range map[string][]string{
		"SecretNotFound":        {"-secret", "nothing"},
		"flag provided but not": {"-x"},
	} {
		if err := run(t.Context(), args, new(bytes.Buffer)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}
