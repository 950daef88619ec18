package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"
)

// This file is the calls of Microsoft Graph that assign an app role: "Grant an
// appRoleAssignment for a service principal" (Microsoft), and what leads up to it.

// A directory is Microsoft Graph, as far as that goes.
type directory struct {
	client *http.Client // which attaches the token
	base   string       // https://graph.microsoft.com
}

// A principal is a service principal: of a service, or of an identity.
type principal struct {
	ID          string `json:"id"`
	AppID       string `json:"appId"`
	DisplayName string `json:"displayName"`
	Type        string `json:"servicePrincipalType"`
	AppRoles    []role `json:"appRoles"`
}

type role struct {
	ID        string `json:"id"`
	Value     string `json:"value"`
	IsEnabled bool   `json:"isEnabled"`
}

type assignment struct {
	PrincipalID string `json:"principalId"`
	ResourceID  string `json:"resourceId"`
	AppRoleID   string `json:"appRoleId"`
}

// A graphError is a refusal of Microsoft Graph.
type graphError struct {
	status        int
	Code, Message string
}

func (e *graphError) Error() string {
	text := fmt.Sprintf("Microsoft Graph answered %d %s: %s", e.status, e.Code, e.Message)
	switch e.status {
	case http.StatusUnauthorized:
		text += "; it takes tokens for https://graph.microsoft.com only"
	case http.StatusForbidden:
		text += "; whoever runs this needs the application permissions Application.Read.All and " +
			"AppRoleAssignment.ReadWrite.All of Microsoft Graph or, as a person, a directory role " +
			"such as Cloud Application Administrator"
	}
	return text
}

var guid = regexp.MustCompile(`^(?i)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// service finds the service principal of a service by its App ID URI.
func (d *directory) service(ctx context.Context, uri string) (*principal, error) {
	found, err := d.find(ctx, "servicePrincipalNames/any(n:n eq '"+quote(uri)+"')")
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("no service principal is called %s: has the service been registered, "+
			"and has it a service principal in this tenant? register.sh does both", uri)
	}
	return &found[0], nil
}

// identity finds the service principal of a managed identity by its object ID, its
// client ID or its name.
func (d *directory) identity(ctx context.Context, name string) (*principal, error) {
	filters := []string{"displayName eq '" + quote(name) + "'"}
	if guid.MatchString(name) {
		filters = []string{"id eq '" + name + "'", "appId eq '" + name + "'"}
	}
	var found []principal
	for _, filter := range filters {
		more, err := d.find(ctx, filter)
		if err != nil {
			return nil, err
		}
		found = append(found, more...)
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("no identity %q is in this tenant: by the object ID or the client ID of the identity, "+
			"or its name, it is found some minutes after it was made", name)
	case 1:
		return &found[0], nil
	}
	return nil, fmt.Errorf("%d service principals are called %q: say which by its object ID", len(found), name)
}

// role returns the app role with a value.
func (p *principal) role(value string) (role, error) {
	var there []string
	for _, r := range p.AppRoles {
		if r.Value == value && r.IsEnabled {
			return r, nil
		}
		if r.Value == value {
			return role{}, fmt.Errorf("the app role %q of %s is not enabled", value, p.DisplayName)
		}
		there = append(there, r.Value)
	}
	return role{}, fmt.Errorf("%s declares no app role %q: it has %q", p.DisplayName, value, there)
}

// assign assigns an app role, and reports whether it was not assigned already.
func (d *directory) assign(ctx context.Context, identity, service *principal, r role) (isNew bool, err error) {
	assigned, err := d.assigned(ctx, identity, service, r)
	if err != nil || assigned {
		return false, err
	}
	err = d.call(ctx, http.MethodPost, "/v1.0/servicePrincipals/"+identity.ID+"/appRoleAssignedTo",
		assignment{PrincipalID: identity.ID, ResourceID: service.ID, AppRoleID: r.ID}, nil)
	// Somebody else may have been faster.
	if refusal := (*graphError)(nil); errors.As(err, &refusal) && strings.Contains(refusal.Message, "already exists") {
		return false, nil
	}
	return err == nil, err
}

// assigned reports whether an identity has an app role.
func (d *directory) assigned(ctx context.Context, identity, service *principal, r role) (bool, error) {
	next := "/v1.0/servicePrincipals/" + identity.ID + "/appRoleAssignments"
	for next != "" {
		var page struct {
			Value []assignment
			Next  string `json:"@odata.nextLink"`
		}
		if err := d.call(ctx, http.MethodGet, next, nil, &page); err != nil {
			return false, err
		}
		for _, a := range page.Value {
			if strings.EqualFold(a.ResourceID, service.ID) && strings.EqualFold(a.AppRoleID, r.ID) {
				return true, nil
			}
		}
		next = page.Next
	}
	return false, nil
}

// find returns the service principals that a filter lets through.
func (d *directory) find(ctx context.Context, filter string) ([]principal, error) {
	var page struct{ Value []principal }
	err := d.call(ctx, http.MethodGet, "/v1.0/servicePrincipals?$filter="+url.QueryEscape(filter), nil, &page)
	return page.Value, err
}

// quote is a string in a filter of OData.
func quote(s string) string { return strings.ReplaceAll(s, "'", "''") }

// call makes a call. The path may be the whole URL of a next page.
func (d *directory) call(ctx context.Context, method, path string, body, answer any) error {
	var content io.Reader
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return err
		}
		content = bytes.NewReader(text)
	}
	if !strings.HasPrefix(path, d.base) {
		path = d.base + path
	}
	req, err := http.NewRequestWithContext(ctx, method, path, content)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := d.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return err
	}
	if resp.StatusCode >= 300 {
		var refusal struct{ Error graphError }
		_ = json.Unmarshal(text, &refusal) // or the status is all there is
		refusal.Error.status = resp.StatusCode
		return &refusal.Error
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(text, answer)
}
