package imdsfake

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// This file is the token endpoint of IMDS, as "How to use managed identities for
// Azure resources on an Azure VM to acquire an access token" (Microsoft) has it.

// apiVersions are those that clients of this endpoint use; MSAL and azidentity,
// 2018-02-01.
var apiVersions = []string{"2018-02-01", "2019-08-01", "2021-02-01"}

// selectors are the query parameters that select an identity. The second name of
// a pair is an alias that IMDS takes too.
var selectors = []string{"client_id", "object_id", "principal_id", "msi_res_id", "mi_res_id"}

// token answers a request for a token, and completes its entry in the journal.
func (h *Handler) token(r *http.Request, entry *Request) answer {
	q, err := url.ParseQuery(r.URL.RawQuery)
	selector, id := selected(q)
	entry.Resource = q.Get("resource")
	if selector != "" {
		entry.Identity = selector + "=" + id
	}
	fault, ok := h.fault(func(Fault) bool { return true })
	if ok {
		if a, ok := fault.befall(r); ok {
			entry.Error = "fault"
			return a
		}
	}
	a, code := h.issueOrRefuse(r, q, err)
	entry.Error = code
	a.failure = fault.Failure // Truncate, if any: the others have befallen it
	return a
}

// selected returns the parameter that selects an identity, and its value.
func selected(q url.Values) (name, value string) {
	for _, name := range selectors {
		if q.Has(name) {
			return name, q.Get(name)
		}
	}
	return "", ""
}

// issueOrRefuse answers a request that no fault befalls. The code is that of the
// error, if it is one.
func (h *Handler) issueOrRefuse(r *http.Request, q url.Values, bad error) (_ answer, code string) {
	if status, code, text := check(r, q, bad); status != 0 {
		return refusal(status, code, text), code
	}
	id, text := h.tenant.identity(selected(q))
	if text != "" {
		return refusal(http.StatusBadRequest, "invalid_request", text), "invalid_request"
	}
	resource := q.Get("resource")
	app, ok := h.tenant.app(resource)
	if !ok {
		return refusal(http.StatusBadRequest, "invalid_resource", fmt.Sprintf("AADSTS500011: "+
			"The resource principal named %s was not found in the tenant named %s. This can happen if "+
			"the application has not been installed by the administrator of the tenant or consented to "+
			"by any user in the tenant. You might have sent your authentication request to the wrong "+
			"tenant.", resource, h.tenant.id)), "invalid_resource"
	}
	return issuedAnswer(h.issue(id, app, resource), id, resource), ""
}

// check returns what is wrong with a request, as far as that can be said without
// the tenant. A parameter that IMDS does not know is refused, which IMDS itself
// does not do: it is a spelling mistake, which makes somebody else of a client.
func check(r *http.Request, q url.Values, bad error) (status int, code, text string) {
	invalid := func(format string, args ...any) (int, string, string) {
		return http.StatusBadRequest, "invalid_request", fmt.Sprintf(format, args...)
	}
	switch {
	case r.Method != http.MethodGet:
		return http.StatusMethodNotAllowed, "method_not_allowed", "Only GET is supported"
	case r.Header.Get("X-Forwarded-For") != "":
		return invalid("Requests with a X-Forwarded-For header are refused")
	case r.Header.Get("Metadata") != "true":
		return http.StatusBadRequest, "bad_request_102", "Required metadata header not specified"
	case bad != nil:
		return invalid("The query is malformed")
	}
	var chosen []string
	for name, values := range q {
		switch {
		case len(values) > 1:
			return invalid("The parameter %q is given more than once", name)
		case slices.Contains(selectors, name):
			chosen = append(chosen, name)
		case name != "api-version" && name != "resource":
			return invalid("The parameter %q is not known", name)
		}
	}
	switch version := q.Get("api-version"); {
	case len(chosen) > 1:
		slices.Sort(chosen)
		return invalid("Only one of %s selects an identity", strings.Join(chosen, ", "))
	case len(chosen) == 1 && q.Get(chosen[0]) == "":
		return invalid("The parameter %q is empty", chosen[0])
	case version == "":
		return invalid("The required parameter \"api-version\" is missing. Newest supported version: %s",
			apiVersions[len(apiVersions)-1])
	case !slices.Contains(apiVersions, version):
		return invalid("The api-version %q is not supported. Supported versions: %s",
			version, strings.Join(apiVersions, ", "))
	case q.Get("resource") == "":
		return invalid("The required parameter \"resource\" is missing")
	}
	return 0, "", ""
}

// issuedAnswer is the answer with a token. IMDS writes numbers as strings, and
// counts expires_in from the issue of the token, not from now.
func issuedAnswer(tok issuedToken, id Identity, resource string) answer {
	lifetime := strconv.FormatInt(int64(tok.expiry.Sub(tok.issued)/time.Second), 10)
	return jsonAnswer(http.StatusOK, map[string]string{
		"access_token":   tok.value,
		"client_id":      id.ClientID,
		"expires_in":     lifetime,
		"expires_on":     strconv.FormatInt(tok.expiry.Unix(), 10),
		"ext_expires_in": lifetime,
		"not_before":     strconv.FormatInt(tok.issued.Unix(), 10),
		"resource":       resource,
		"token_type":     "Bearer",
	})
}

// refusal is the answer with an error.
func refusal(status int, code, text string) answer {
	return jsonAnswer(status, map[string]string{"error": code, "error_description": text})
}

func jsonAnswer(status int, v any) answer {
	body, err := json.Marshal(v)
	if err != nil {
		panic("imdsfake: " + err.Error()) // our own values always encode
	}
	h := http.Header{}
	h.Set("Content-Type", "application/json; charset=utf-8")
	h.Set("Server", "imdsfake")
	return answer{status: status, header: h, body: body}
}
