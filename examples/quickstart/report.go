package main

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// A report prints the story: numbered headlines, with facts below them.
type report struct {
	w     io.Writer
	steps int // so far
}

// headline begins the next step.
func (r *report) headline(format string, args ...any) {
	r.steps++
	fmt.Fprintf(r.w, "\n%d. %s\n", r.steps, fmt.Sprintf(format, args...))
}

// fact prints one fact of the step.
func (r *report) fact(name, format string, args ...any) {
	text := strings.TrimSpace(fmt.Sprintf(format, args...))
	fmt.Fprintf(r.w, "   %-10s  %s\n", name, text)
}

// at prints what has just happened to a token of some age.
func (r *report) at(age time.Duration, format string, args ...any) {
	r.fact(fmt.Sprintf("age %4.1f s", age.Seconds()), format, args...)
}

// thousands prints a number with a comma between its thousands.
func thousands(n int) string {
	if n < 1000 {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%s,%03d", thousands(n/1000), n%1000)
}
