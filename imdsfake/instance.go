package imdsfake

import (
	"net/http"
	"regexp"
	"strconv"
	"strings"
)

// This file is the rest of IMDS, as far as clients need it to find out where they
// are: "Azure Instance Metadata Service for virtual machines" (Microsoft).

const (
	instancePath = "/metadata/instance"
	versionsPath = "/metadata/versions"
)

// instanceVersions are the newest versions of that API.
var instanceVersions = []string{"2023-11-15", "2023-07-01", "2021-12-13"}

var versionForm = regexp.MustCompile(`^20\d\d-\d\d-\d\d$`)

// metadata answers a request to IMDS that is not for a token.
func (h *Handler) metadata(c *call) answer {
	path := strings.TrimSuffix(c.URL.Path, "/")
	q := c.URL.Query()
	switch {
	case strings.HasPrefix(path, "/metadata/identity/"):
		return refusal(c, &problem{status: 401, code: "unknown_source", text: "Unknown Source " + c.base() + c.URL.Path})
	case c.Method != http.MethodGet:
		return instanceError(c, http.StatusMethodNotAllowed, "Method not allowed")
	case c.Header.Get("X-Forwarded-For") != "":
		return instanceError(c, http.StatusBadRequest, "Bad request. Requests with a X-Forwarded-For header are refused")
	case c.Header.Get("Metadata") != "true":
		return instanceError(c, http.StatusBadRequest, "Bad request. Required metadata header not specified")
	case path == versionsPath:
		c.entry.Reason = "the versions"
		return jsonAnswer(http.StatusOK, map[string]any{"apiVersions": instanceVersions})
	case path != instancePath && !strings.HasPrefix(path, instancePath+"/"):
		return instanceError(c, http.StatusNotFound, "Not found")
	case !versionForm.MatchString(q.Get("api-version")):
		return instanceError(c, http.StatusBadRequest, "Bad request. api-version was not specified in the request. "+
			"For more information refer to aka.ms/azureimds")
	}
	return h.instance(c, strings.Split(path, "/")[3:], q.Get("format"))
}

// instanceError is an error as that API writes it.
func instanceError(c *call, status int, text string) answer {
	c.entry.Error, c.entry.Reason = "error", text
	body := map[string]any{"error": text}
	if strings.Contains(text, "api-version") {
		body["newest-versions"] = instanceVersions
	}
	return jsonAnswer(status, body)
}

// instance answers with a part of the document.
func (h *Handler) instance(c *call, path []string, format string) answer {
	var part any = h.document()
	for _, name := range path {
		var ok bool
		if part, ok = child(part, name); !ok {
			return instanceError(c, http.StatusNotFound, "Not found")
		}
	}
	c.entry.Reason = "a part of the document"
	text, isText := part.(string)
	switch {
	case isText && format != "json":
		a := jsonAnswer(http.StatusOK, nil)
		a.header.Set("Content-Type", "text/plain; charset=utf-8")
		a.body = []byte(text)
		return a
	case format == "text":
		return instanceError(c, http.StatusBadRequest, "Bad request. format=text is for a single value")
	}
	return jsonAnswer(http.StatusOK, part)
}

// document is what IMDS tells about the machine.
func (h *Handler) document() map[string]any {
	hostID := h.tenant.hostID()
	return map[string]any{
		"compute": map[string]any{
			"azEnvironment":     "AzurePublicCloud",
			"location":          "westeurope",
			"name":              hostID[strings.LastIndex(hostID, "/")+1:],
			"osType":            "Linux",
			"provider":          "Microsoft.Compute",
			"resourceGroupName": "imdsfake",
			"resourceId":        hostID,
			"subscriptionId":    guid(h.tenant.id, "subscription"),
			"tags":              "",
			"vmId":              guid(h.tenant.id, "vm"),
			"vmScaleSetName":    "",
			"vmSize":            "Standard_D2s_v5",
			"zone":              "1",
		},
		"network": map[string]any{"interface": []any{map[string]any{
			"ipv4": map[string]any{
				"ipAddress": []any{map[string]any{"privateIpAddress": "10.0.0.4", "publicIpAddress": ""}},
				"subnet":    []any{map[string]any{"address": "10.0.0.0", "prefix": "24"}},
			},
			"ipv6":       map[string]any{"ipAddress": []any{}},
			"macAddress": "000D3A000001",
		}}},
	}
}

// child returns a member of an object, or an element of an array.
func child(v any, name string) (any, bool) {
	switch v := v.(type) {
	case map[string]any:
		c, ok := v[name]
		return c, ok
	case []any:
		i, err := strconv.Atoi(name)
		if err != nil || i < 0 || i >= len(v) {
			return nil, false
		}
		return v[i], true
	}
	return nil, false
}
