package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/aztoso/mitoken/imdsfake"
	"github.com/goccy/go-yaml/ast"
)

// bodyLimit is how many bytes of a request to the controls are read.
const bodyLimit = 1 << 20

// newControls returns the controls of a fake, for tests in any language:
//
//	GET    /imdsfake/directory    the tenant
//	GET    /imdsfake/requests     the journal; with ?atLeast=3&timeout=10s it waits for more
//	GET    /imdsfake/tokens       what was issued, without the signatures
//	GET    /imdsfake/faults       the script
//	POST   /imdsfake/faults       adds to it: a fault or a list, in JSON or YAML
//	DELETE /imdsfake/faults       ends all faults
//	POST   /imdsfake/assignments  assigns app roles: one or a list
//	POST   /imdsfake/keys         signs with a new key from then on
//	GET    /imdsfake/env?host=... the variables of a host, for a shell to eval
//	GET    /imdsfake/certificate  that of https, in PEM
//
// Pages of other origins cannot use them. secure is the base URL for https, or empty.
func newControls(h *imdsfake.Handler, secure string) http.Handler {
	c := controls{h, secure}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /imdsfake/directory", func(w http.ResponseWriter, r *http.Request) { reply(w, h.Directory()) })
	mux.HandleFunc("GET /imdsfake/tokens", func(w http.ResponseWriter, r *http.Request) { reply(w, list(h.Tokens())) })
	mux.HandleFunc("GET /imdsfake/faults", func(w http.ResponseWriter, r *http.Request) { reply(w, list(h.Faults())) })
	mux.HandleFunc("GET /imdsfake/requests", c.requests)
	mux.HandleFunc("GET /imdsfake/env", c.env)
	mux.HandleFunc("GET /imdsfake/certificate", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/x-pem-file")
		_ = pem.Encode(w, &pem.Block{Type: "CERTIFICATE", Bytes: h.Certificate().Certificate[0]})
	})
	mux.HandleFunc("POST /imdsfake/faults", c.inject)
	mux.HandleFunc("DELETE /imdsfake/faults", func(w http.ResponseWriter, r *http.Request) {
		h.Clear()
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("POST /imdsfake/assignments", c.assign)
	mux.HandleFunc("POST /imdsfake/keys", func(w http.ResponseWriter, r *http.Request) {
		h.RotateKey()
		w.WriteHeader(http.StatusNoContent)
	})
	return http.NewCrossOriginProtection().Handler(mux)
}

type controls struct {
	*imdsfake.Handler
	secure string
}

// list has nothing as [], not as null.
func list[E any](s []E) []E {
	if s == nil {
		return []E{}
	}
	return s
}

// reply writes JSON, with durations as they are read: "30s".
func reply(w http.ResponseWriter, v any) {
	var plain any
	body, err := json.Marshal(v)
	if err == nil {
		d := json.NewDecoder(bytes.NewReader(body))
		d.UseNumber() // which keeps all digits
		err = d.Decode(&plain)
	}
	if err == nil {
		spell(plain)
		body, err = json.Marshal(plain)
	}
	if err != nil {
		refuse(w, http.StatusInternalServerError, err)
		return
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	_, _ = w.Write(body) // a client that has left wants nothing
}

// spell puts the durations in a decoded value in words.
func spell(v any) {
	switch v := v.(type) {
	case []any:
		for _, e := range v {
			spell(e)
		}
	case map[string]any:
		for name, e := range v {
			if n, ok := e.(json.Number); ok && slices.Contains(durations, name) {
				d, _ := n.Int64() // as all durations are
				v[name] = time.Duration(d).String()
			}
			if name != "fields" && name != "claims" { // whose keys are anybody's
				spell(e)
			}
		}
	}
}

func refuse(w http.ResponseWriter, status int, err error) {
	body, _ := json.Marshal(map[string]string{"error": err.Error()}) // strings always encode
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	_, _ = w.Write(body)
}

// requests answers with the journal, or waits for it to grow.
func (c controls) requests(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	n, err := strconv.Atoi(cmp.Or(q.Get("atLeast"), "0"))
	if err != nil {
		refuse(w, http.StatusBadRequest, fmt.Errorf("atLeast: %q is no number", q.Get("atLeast")))
		return
	}
	timeout, err := time.ParseDuration(cmp.Or(q.Get("timeout"), "10s"))
	if err != nil {
		refuse(w, http.StatusBadRequest, fmt.Errorf("timeout: %q is no duration, such as 10s", q.Get("timeout")))
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), timeout)
	defer cancel()
	found, err := c.WaitFor(ctx, n, nil)
	if err != nil {
		refuse(w, http.StatusRequestTimeout, fmt.Errorf("%d requests after %v, not %d", len(found), timeout, n))
		return
	}
	reply(w, list(found))
}

// inject adds faults to the script, all of them or none.
func (c controls) inject(w http.ResponseWriter, r *http.Request) {
	faults, err := readList[imdsfake.Fault](r)
	for i, f := range faults {
		if wrong := f.Check(); wrong != nil && err == nil {
			err = fmt.Errorf("faults[%d]: %w", i, wrong)
		}
	}
	if err != nil {
		refuse(w, http.StatusBadRequest, err)
		return
	}
	c.Inject(faults...)
	w.WriteHeader(http.StatusNoContent)
}

// assign assigns app roles, all of them or none.
func (c controls) assign(w http.ResponseWriter, r *http.Request) {
	assignments, err := readList[imdsfake.Assignment](r)
	if err == nil {
		err = c.tryAssign(assignments)
	}
	if err != nil {
		refuse(w, http.StatusBadRequest, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// tryAssign asks a copy of the tenant first, since Assign panics where it cannot.
func (c controls) tryAssign(assignments []imdsfake.Assignment) error {
	d := c.Directory()
	copied := &imdsfake.Handler{Tenant: d.Tenant, Identities: d.Identities, Apps: d.Apps,
		ServicePrincipals: d.ServicePrincipals, Assignments: assignments}
	if err := copied.Check(); err != nil {
		return err
	}
	c.Assign(assignments...)
	return nil
}

// readList reads one thing, or a list of them.
func readList[E any](r *http.Request) ([]E, error) {
	data, err := io.ReadAll(http.MaxBytesReader(nil, r.Body, bodyLimit))
	if err != nil {
		return nil, err
	}
	var many []E
	switch body := bodyOf(data); {
	case body == nil:
		return nil, errors.New("the body is empty")
	case body.Type() == ast.SequenceType:
		err = decode(data, &many)
	default:
		many = make([]E, 1)
		err = decode(data, &many[0])
	}
	if err != nil {
		return nil, fmt.Errorf("the body:%w", err)
	}
	return many, nil
}

// hosts are all of them, by the names that they have on a command line.
var hosts = []struct {
	name string
	host imdsfake.Host
}{
	{"imds", imdsfake.IMDS},
	{"appservice", imdsfake.AppService},
	{"azureml", imdsfake.AzureML},
	{"cloudshell", imdsfake.CloudShell},
	{"arc", imdsfake.Arc},
	{"servicefabric", imdsfake.ServiceFabric},
	{"entra", imdsfake.Entra},
}

// env answers with the variables of a host, in lines for a shell.
func (c controls) env(w http.ResponseWriter, r *http.Request) {
	name := strings.ToLower(strings.ReplaceAll(r.URL.Query().Get("host"), " ", ""))
	for _, h := range hosts {
		if h.name != name {
			continue
		}
		base := "http://" + r.Host
		if h.host == imdsfake.ServiceFabric || h.host == imdsfake.Entra {
			base = c.secure
		}
		if base == "" {
			refuse(w, http.StatusBadRequest, fmt.Errorf("host: %s is over https only: see -tls", h.host))
			return
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		for _, line := range variables(c.Handler, h.host, base) {
			name, value, _ := strings.Cut(line, "=")
			fmt.Fprintf(w, "export %s='%s'\n", name, strings.ReplaceAll(value, "'", `'\''`))
		}
		return
	}
	refuse(w, http.StatusBadRequest, fmt.Errorf("host: %q is none of imds, appservice, azureml, cloudshell, arc, servicefabric, entra", name))
}

// variables returns those of a host, sorted, as NAME=value.
func variables(h *imdsfake.Handler, host imdsfake.Host, base string) []string {
	var lines []string
	for name, value := range h.Env(host, base) {
		lines = append(lines, name+"="+value)
	}
	slices.Sort(lines)
	return lines
}
