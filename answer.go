package mitoken

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// This file is what issuers answer: a token, which is checked to the letter
// before anybody gets it, or a refusal.

const (
	maxAnswer      = 64 << 10 // bytes
	maxDescription = 512      // bytes of an error's description
	lastExpiry     = 1 << 33  // the year 2242, in Unix seconds; a later one is no time
)

// b64token is RFC 6750, section 2.1: what may follow "Bearer " in a header.
var b64token = regexp.MustCompile(`^[A-Za-z0-9._~+/-]+=*$`)

// checkToken returns an error if a string cannot be an access token.
func checkToken(s string) error {
	switch {
	case s == "":
		return errors.New("access_token is empty")
	case !b64token.MatchString(s):
		return errors.New("access_token has characters that RFC 6750, section 2.1, does not allow")
	}
	return nil
}

// readToken returns the token that IMDS answered with. clientID is the one
// asked for, or empty.
func readToken(resp *http.Response, resource, clientID string) (*token, error) {
	body, err := io.ReadAll(resp.Body)
	if err == nil {
		var tok *token
		if tok, err = parseToken(body, resource, clientID); err == nil {
			return tok, nil
		}
	}
	if t, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); t != "application/json" {
		err = fmt.Errorf("%w; its content type is %.64q: is a proxy in between?", err, t)
	}
	return nil, fmt.Errorf("the metadata service answered 200, but %w", err)
}

// parseToken checks an answer of IMDS as strictly as its documentation allows.
// The error names the field, and shows no value that could be a token.
func parseToken(body []byte, resource, clientID string) (*token, error) {
	f, err := parseFields(body)
	if err != nil {
		return nil, err
	}
	// In the order of what the reader of the error has to know first.
	tok := &token{value: f.text("access_token")}
	kind, from, to := f.text("token_type"), f.text("client_id"), f.text("resource")
	expiry, notBefore := f.seconds("expires_on"), f.seconds("not_before")
	tok.expiresIn = time.Duration(f.seconds("expires_in")) * time.Second
	switch {
	case f.err != nil:
		return nil, f.err
	case expiry == 0:
		return nil, errors.New("expires_on is missing")
	case kind != "" && !strings.EqualFold(kind, "Bearer"):
		return nil, fmt.Errorf("token_type is not Bearer")
	case to != "" && strings.TrimSuffix(to, "/") != strings.TrimSuffix(resource, "/"):
		return nil, fmt.Errorf("resource is %.128q: the token is for somebody else", to)
	case from != "" && clientID != "" && !strings.EqualFold(from, clientID):
		return nil, fmt.Errorf("client_id is %.128q: the token is another identity's", from)
	}
	tok.expiry = time.Unix(expiry, 0)
	if notBefore != 0 {
		tok.notBefore = time.Unix(notBefore, 0)
	}
	return tok, checkToken(tok.value)
}

// fields are those of an answer, with the first mistake found in them.
type fields struct {
	values map[string]any
	err    error
}

// parseFields parses a JSON object. It is stricter than encoding/json, which
// takes ACCESS_TOKEN for access_token and the last of two.
func parseFields(body []byte) (*fields, error) {
	if len(body) > maxAnswer {
		return nil, fmt.Errorf("the answer is longer than %d bytes", maxAnswer)
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, errors.New("the answer is not a JSON object")
	}
	f := &fields{values: map[string]any{}}
	folded := map[string]bool{}
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return nil, errors.New("the answer is not valid JSON")
		}
		name := key.(string) // in an object, the decoder takes nothing else
		var value any
		if err := d.Decode(&value); err != nil {
			return nil, errors.New("the answer is not valid JSON")
		}
		fold := strings.ToLower(strings.ToUpper(name))
		if folded[fold] {
			return nil, fmt.Errorf("the answer has %s twice", known(fold))
		}
		folded[fold] = true
		f.values[name] = value
	}
	if _, err := d.Token(); err != nil {
		return nil, errors.New("the answer is not valid JSON")
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("the answer goes on after its JSON object")
	}
	return f, nil
}

// known returns the name of a field, unless it is one that a stranger chose.
func known(name string) string {
	switch name {
	case "access_token", "token_type", "resource", "client_id",
		"expires_on", "expires_in", "not_before":
		return name
	}
	return "a field"
}

// text returns the string of a field, and empty if there is none.
func (f *fields) text(name string) string {
	switch v := f.values[name].(type) {
	case nil:
		return ""
	case string:
		return v
	}
	f.fail("%s is not a string", name)
	return ""
}

// seconds returns the number of a field, and 0 if there is none. IMDS writes
// numbers as strings, other versions of it as numbers.
func (f *fields) seconds(name string) int64 {
	var s string
	switch v := f.values[name].(type) {
	case nil:
	case string:
		s = v
	case json.Number:
		s = v.String()
	default:
		f.fail("%s is not a number", name)
	}
	if s == "" {
		return 0
	}
	n, err := strconv.ParseInt(s, 10, 64)
	switch {
	case err != nil:
		f.fail("%s is not a whole number of seconds", name)
	case n < 0 || n > lastExpiry:
		f.fail("%s is out of range", name)
	default:
		return n
	}
	return 0
}

func (f *fields) fail(format, name string) {
	if f.err == nil {
		f.err = fmt.Errorf(format, name)
	}
}

// A ResponseError is an answer that refuses a token: of the metadata service, or
// of the token endpoint behind an Upstream or a Fallback. Use [errors.As] to get
// at it.
type ResponseError struct {
	// StatusCode is the HTTP status code.
	StatusCode int

	// Code is the "error" of the answer (RFC 6749, section 5.2), such as
	// "invalid_request"; empty if it had none.
	Code string

	// Description is the "error_description" of the answer, cut to 512 bytes.
	// It is for people: Microsoft's texts change.
	Description string

	// CorrelationID is what Microsoft's support asks for; empty if there is none.
	CorrelationID string

	retryAfter time.Duration
}

func (e *ResponseError) Error() string {
	var b strings.Builder
	b.WriteString(strconv.Itoa(e.StatusCode))
	if e.Code != "" {
		b.WriteString(" " + e.Code)
	} else if text := http.StatusText(e.StatusCode); text != "" {
		b.WriteString(" " + text)
	}
	if e.Description != "" {
		fmt.Fprintf(&b, ": %q", e.Description)
	}
	if e.CorrelationID != "" {
		fmt.Fprintf(&b, " (correlation ID %s)", e.CorrelationID)
	}
	return b.String()
}

// hint returns what to do about a refusal of IMDS, to follow the error's text.
func (e *ResponseError) hint() string {
	switch {
	case e.Code == "invalid_resource":
		return "; is the resource the App ID URI of a service in this tenant?"
	case e.StatusCode == http.StatusBadRequest:
		return "; is the identity assigned to this host, and Credential.ID right?"
	case e.StatusCode == http.StatusTooManyRequests:
		return "; the processes of this host ask too often"
	case e.StatusCode < 400, e.StatusCode == http.StatusForbidden:
		return "; is a proxy or a network policy in between?"
	}
	return ""
}

// readError returns the refusal in a response. Nothing of its body is kept but
// the fields of an error: the rest could hold a token.
func readError(resp *http.Response) *ResponseError {
	e := &ResponseError{
		StatusCode:    resp.StatusCode,
		CorrelationID: printable(resp.Header.Get("X-Ms-Request-Id"), 64),
		retryAfter:    retryAfter(resp.Header, time.Now()),
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return e
	}
	var answer struct {
		Error         json.RawMessage `json:"error"`
		Description   string          `json:"error_description"`
		CorrelationID string          `json:"correlation_id"`
		Message       string          `json:"message"`
	}
	if json.Unmarshal(body, &answer) != nil {
		return e
	}
	// Entra and IMDS: {"error": "code", "error_description": "..."}. Graph, Cloud
	// Shell and Service Fabric: {"error": {"code": "...", "message": "..."}}. App
	// Service: {"statusCode": 400, "message": "..."}.
	var nested struct{ Code, Message string }
	if json.Unmarshal(answer.Error, &nested.Code) != nil {
		_ = json.Unmarshal(answer.Error, &nested)
	}
	e.Code = printable(nested.Code, 64)
	e.Description = printable(answer.Description+nested.Message+answer.Message, maxDescription)
	if answer.CorrelationID != "" {
		e.CorrelationID = printable(answer.CorrelationID, 64)
	}
	return e
}

// printable returns at most n bytes of s, on one line.
func printable(s string, n int) string {
	s = strings.Join(strings.FieldsFunc(s, func(r rune) bool {
		return unicode.IsSpace(r) || !unicode.IsPrint(r)
	}), " ")
	if len(s) > n {
		s = strings.ToValidUTF8(s[:n], "") + "..."
	}
	return s
}

// checkPrintable returns an error if s has a space or a control character in it.
func checkPrintable(s string) error {
	if !utf8.ValidString(s) {
		return fmt.Errorf("%.128q is not valid UTF-8", s)
	}
	for _, r := range s {
		if unicode.IsSpace(r) || !unicode.IsPrint(r) {
			return fmt.Errorf("%.128q has the character %U in it", s, r)
		}
	}
	return nil
}

// retryAfter returns what a Retry-After header asks for (RFC 9110, section
// 10.2.3: seconds or a date), and 0 if it makes no sense. The date is measured
// by the clock of whoever wrote it, where that is known.
func retryAfter(h http.Header, now time.Time) time.Duration {
	v := h.Get("Retry-After")
	if n, err := strconv.ParseInt(v, 10, 64); err == nil || errors.Is(err, strconv.ErrRange) {
		return time.Duration(max(0, min(n, int64(maxLifetime/time.Second)))) * time.Second
	}
	date, err := http.ParseTime(v)
	if err != nil {
		return 0
	}
	if sent, err := http.ParseTime(h.Get("Date")); err == nil {
		now = sent
	}
	return clamp(date.Sub(now), 0, maxLifetime)
}
