package mitoken

import (
	"net/http"
	"strings"
)

// This file reads the challenges of a 401 (RFC 9110, section 11.6.1).

// refusesToken reports whether a service says that a token is invalid: expired,
// revoked, or malformed (RFC 6750, section 3.1).
func refusesToken(h http.Header) bool {
	for _, v := range h.Values("WWW-Authenticate") {
		bearer := false
		for s := (scanner{v}); s.text != ""; {
			name, value, isParameter := s.next()
			if !isParameter {
				bearer = strings.EqualFold(name, "Bearer")
			} else if bearer && strings.EqualFold(name, "error") && value == "invalid_token" {
				return true
			}
		}
	}
	return false
}

// A scanner takes a list of challenges apart: each is a scheme, and parameters.
type scanner struct{ text string }

// next returns the next scheme or parameter. What is neither is skipped: the
// text gets shorter each time.
func (s *scanner) next() (name, value string, isParameter bool) {
	s.text = strings.TrimLeft(s.text, " \t,")
	name = s.word()
	rest := strings.TrimLeft(s.text, " \t")
	after, ok := strings.CutPrefix(rest, "=")
	if !ok {
		if name == "" && s.text != "" {
			s.text = s.text[1:]
		}
		return name, "", false
	}
	s.text = strings.TrimLeft(after, " \t")
	if strings.HasPrefix(s.text, `"`) {
		return name, s.quoted(), true
	}
	return name, s.word(), true
}

// word takes a token (RFC 9110, section 5.6.2), as far as it matters here.
func (s *scanner) word() string {
	end := strings.IndexAny(s.text, " \t,=\"")
	if end < 0 {
		end = len(s.text)
	}
	word := s.text[:end]
	s.text = s.text[end:]
	return word
}

// quoted takes a quoted string (RFC 9110, section 5.6.4), or what there is of it.
func (s *scanner) quoted() string {
	var b strings.Builder
	for i := 1; i < len(s.text); i++ {
		switch c := s.text[i]; {
		case c == '"':
			s.text = s.text[i+1:]
			return b.String()
		case c == '\\' && i+1 < len(s.text):
			i++
			b.WriteByte(s.text[i])
		default:
			b.WriteByte(c)
		}
	}
	s.text = ""
	return b.String()
}
