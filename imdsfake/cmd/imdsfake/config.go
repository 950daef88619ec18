package main

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/aztoso/mitoken/imdsfake"
	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// A config is the content of a configuration file: YAML, of which JSON is a part.
// Its keys are those of the Handler's fields.
type config struct {
	Listen     string              `json:"listen"`    // address for http
	ListenTLS  string              `json:"listenTLS"` // address for https; empty if there is to be none
	Tenant     string              `json:"tenant"`
	Lifetime   time.Duration       `json:"lifetime"`
	Cache      imdsfake.Cache      `json:"cache"`
	Limits     imdsfake.Limits     `json:"limits"`
	Secret     string              `json:"secret"`
	KeyDir     string              `json:"keyDir"`
	Identities []imdsfake.Identity `json:"identities"`
	Apps       []app               `json:"apps"`

	ServicePrincipals []servicePrincipal `json:"servicePrincipals"`

	Assignments []imdsfake.Assignment `json:"assignments"`
	Faults      []imdsfake.Fault      `json:"faults"`
}

// An app may have its roles in a file of their own: the manifest that "az ad app
// create --app-roles" takes. Its path is relative to that of the configuration.
type app struct {
	imdsfake.App `yaml:",inline"`
	Manifest     string `json:"manifest"`
}

// A servicePrincipal has its certificate in a file, in PEM. Its path is relative
// to that of the configuration.
type servicePrincipal struct {
	imdsfake.ServicePrincipal `yaml:",inline"`
	CertificateFile           string `json:"certificate"`
}

// readConfig reads a file, and says where in it a mistake is.
func readConfig(name string) (*config, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	c, err := parseConfig(data, filepath.Dir(name))
	if err != nil {
		return nil, fmt.Errorf("%s:%w", name, err)
	}
	return c, nil
}

// parseConfig returns what a file says. Its error begins with the line and the
// column, if they are known.
func parseConfig(data []byte, dir string) (*config, error) {
	c := new(config)
	if err := decode(data, c); err != nil {
		return nil, err
	}
	for i := range c.Apps {
		if err := c.Apps[i].readManifest(dir); err != nil {
			return nil, inFile(data, fmt.Errorf("apps[%d]: manifest: %w", i, err))
		}
	}
	for i := range c.ServicePrincipals {
		if err := c.ServicePrincipals[i].readCertificate(dir); err != nil {
			return nil, inFile(data, fmt.Errorf("servicePrincipals[%d]: certificate: %w", i, err))
		}
	}
	if err := c.handler().Check(); err != nil {
		return nil, inFile(data, err)
	}
	for i, f := range c.Faults {
		if err := f.Check(); err != nil {
			return nil, inFile(data, fmt.Errorf("faults[%d]: %w", i, err))
		}
	}
	return c, nil
}

func (a *app) readManifest(dir string) error {
	switch {
	case a.Manifest == "":
		return nil
	case len(a.Roles) > 0:
		return errors.New("the app has roles, too")
	}
	data, err := os.ReadFile(within(dir, a.Manifest))
	if err != nil {
		return err
	}
	a.Roles, err = imdsfake.ParseManifest(data)
	return err
}

func (sp *servicePrincipal) readCertificate(dir string) error {
	if sp.CertificateFile == "" {
		return nil
	}
	data, err := os.ReadFile(within(dir, sp.CertificateFile))
	if err != nil {
		return err
	}
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" {
		return errors.New("the file has no certificate in PEM")
	}
	sp.Certificate, err = x509.ParseCertificate(block.Bytes)
	return err
}

// within returns a path that is relative to a directory.
func within(dir, path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}

// handler returns what is to be served.
func (c *config) handler() *imdsfake.Handler {
	h := &imdsfake.Handler{
		Tenant:      c.Tenant,
		Identities:  c.Identities,
		Assignments: c.Assignments,
		Lifetime:    c.Lifetime,
		Cache:       c.Cache,
		Limits:      c.Limits,
		Secret:      c.Secret,
		KeyDir:      c.KeyDir,
	}
	for _, sp := range c.ServicePrincipals {
		h.ServicePrincipals = append(h.ServicePrincipals, sp.ServicePrincipal)
	}
	for _, a := range c.Apps {
		h.Apps = append(h.Apps, a.App)
	}
	return h
}

// decode decodes YAML, in which unknown keys are errors.
func decode(data []byte, v any) (err error) {
	defer func() {
		if recover() != nil { // of the decoder, on tags where it does not expect them
			err = errors.New(" the YAML cannot be understood: are there tags or anchors in it?")
		}
	}()
	file, err := parser.ParseBytes(data, 0)
	if err == nil {
		if len(file.Docs) > 1 {
			return errors.New(" there is more than one document")
		}
		if err := checkDurations(file); err != nil {
			return err
		}
		err = yaml.UnmarshalWithOptions(data, v, yaml.Strict())
	}
	var at yaml.Error
	if errors.As(err, &at) {
		return placed(at.GetToken(), at.GetMessage())
	}
	if err != nil {
		return fmt.Errorf(" %w", err)
	}
	return nil
}

func placed(t *token.Token, text string) error {
	if t == nil || t.Position == nil {
		return errors.New(" " + oneLine(text))
	}
	return fmt.Errorf("%d:%d: %s", t.Position.Line, t.Position.Column, oneLine(text))
}

// oneLine is a text on one line: it may hold a piece of the file.
func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }

// bodyOf returns what a text has in it; nil if that is nothing, or not YAML.
func bodyOf(data []byte) ast.Node {
	file, err := parser.ParseBytes(data, 0)
	if err != nil || len(file.Docs) == 0 || file.Docs[0].Body == nil {
		if err != nil && len(bytes.TrimSpace(data)) > 0 {
			return ast.Null(nil) // decode says what is wrong
		}
		return nil
	}
	return file.Docs[0].Body
}

// durations are the keys of values with a unit of time.
var durations = []string{"lifetime", "for", "latency", "jitter", "drip"}

// checkDurations says where a value has no unit of time, or none that is known,
// which the decoder does not.
func checkDurations(file *ast.File) error {
	w := new(durationWalk)
	for _, doc := range file.Docs {
		if doc.Body != nil {
			ast.Walk(w, doc.Body)
		}
	}
	return w.err
}

type durationWalk struct{ err error }

func (w *durationWalk) Visit(n ast.Node) ast.Visitor {
	pair, ok := n.(*ast.MappingValueNode)
	if !ok || w.err != nil {
		return w
	}
	key := pair.Key.GetToken().Value
	if key == "fields" || key == "header" {
		return nil // whose keys are anybody's
	}
	switch pair.Value.(type) {
	case *ast.StringNode, *ast.IntegerNode, *ast.FloatNode:
	default:
		return w // an anchor, say: the decoder sees to it
	}
	if slices.Contains(durations, key) {
		t := pair.Value.GetToken()
		_, isText := pair.Value.(*ast.StringNode)
		if _, err := time.ParseDuration(t.Value); err != nil || !isText {
			w.err = placed(t, fmt.Sprintf("%s: %q is no duration, such as 30s or 12h", key, t.Value))
		}
	}
	return w
}

// segment is a part of the path that the errors of Check begin with.
var segment = regexp.MustCompile(`^([A-Za-z]+(?:\[\d+\])?): `)

// inFile says where in a file an error of Check is: at the last part of its path
// that the file has.
func inFile(data []byte, err error) error {
	path, text := "$", err.Error()
	var at *token.Token
	for {
		m := segment.FindStringSubmatch(text)
		if m == nil {
			break
		}
		text = text[len(m[0]):]
		path += "." + m[1]
		p, perr := yaml.PathString(path)
		if perr != nil {
			break
		}
		node, perr := p.ReadNode(bytes.NewReader(data))
		if perr != nil {
			break
		}
		at = node.GetToken()
	}
	return placed(at, strings.TrimPrefix(err.Error(), "imdsfake: "))
}
