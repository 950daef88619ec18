package main

import (
	"regexp"
	"strings"
	"testing"
)

// TestStory runs the quickstart, and checks that it claims what it has to. What
// it claims, it checks itself.
func TestStory(t *testing.T) {
	if testing.Short() {
		t.Skip("the story takes 20 s")
	}
	t.Parallel()
	var out strings.Builder
	if err := run(&out); err != nil {
		t.Fatalf("%v\n\nafter:\n%s", err, out.String())
	}
	for _, want := range []string{
		`\n1\. (.*\n)+ +aud +https://myapp\.aztoso\.com `,
		` iss +\S+/` + tenant + `/ `,
		` appid +` + daemonID + ` `,
		` roles +consumer `,
		`\n2\. .*\n +role +200 OK, "hello, ` + daemonID + `"\n`,
		`\n3\. .*\n +no token +401 .*\n +altered +401 .*invalid_token.*\n`,
		` no role +403 .*insufficient_scope`,
		`\n4\. .*\n +requests +1 .*\n +calls +5,000 in `,
		`\n5\. (.*\n)+ +age +[4-7]\.\d s +replaced .* at [45]\d % `,
		`\n6\. (.*\n)+ +age .* a refresh fails, (.*\n)+ +age .* it is back; the token has \d\.\d s left`,
		` replaced, after \d+ failures .*\n +calls +\d+, 0 failed, `,
		`\nAll of this was checked and held\.`,
	} {
		if !regexp.MustCompile(want).MatchString(out.String()) {
			t.Errorf("the output does not match %q", want)
		}
	}
	if strings.Contains(out.String(), "eyJ") {
		t.Error("the output holds a token")
	}
	if lines := strings.Count(out.String(), "\n"); lines > 50 {
		t.Errorf("the output has %d lines", lines)
	}
	if t.Failed() {
		t.Log(out.String())
	}
}
