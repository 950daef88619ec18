package mitoken

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	msal "github.com/AzureAD/microsoft-authentication-library-for-go/apps/managedidentity"
)

// This file finds out what kind of host this is. Virtual machines have IMDS,
// which is asked natively; the others have services of their own, with protocols
// that azidentity knows.

// A host is the issuer of this host's identity, whatever kind of host it is. It
// finds out when it is first asked, and never again.
type host struct {
	id        azidentity.ManagedIDKind
	imds      issuer             // of a virtual machine, or of what may be one
	transport policy.Transporter // of the others; nil but in tests

	once   sync.Once
	chosen issuer // set by once
	err    error  // why there is none; set by once
}

func (h *host) issue(ctx context.Context, resource string, r round) (*token, error) {
	h.once.Do(h.choose)
	if h.err != nil {
		return nil, h.err
	}
	return h.chosen.issue(ctx, resource, r)
}

func (h *host) source() string {
	h.once.Do(h.choose)
	if h.err != nil {
		return "none"
	}
	return h.chosen.source()
}

// choose goes by the environment, in the order in which azidentity does: MSAL
// decides between the hosts that have managed identities. What it does not know,
// and what looks like a virtual machine to it, is the workload identity of a pod
// in AKS ("Use Microsoft Entra Workload ID with AKS", Microsoft).
func (h *host) choose() {
	kind, err := msal.GetSource()
	switch {
	case err != nil:
		h.err = err
	case kind != msal.DefaultToIMDS:
		h.chosen, h.err = h.managed(strings.ToLower(string(kind)))
	case isWorkload():
		h.chosen, h.err = h.workload()
	default:
		h.chosen = h.imds
	}
}

// managed returns the issuer of a host whose protocol azidentity speaks.
func (h *host) managed(name string) (issuer, error) {
	options := &azidentity.ManagedIdentityCredentialOptions{ID: h.id}
	options.Retry.TryTimeout = tryTimeout
	if options.Transport = h.transport; h.transport == nil {
		// azcore's own would ask a proxy for what is on the host itself.
		options.Transport = &http.Client{Transport: hostTransport}
	}
	cred, err := azidentity.NewManagedIdentityCredential(options)
	if err != nil {
		return nil, fmt.Errorf("the environment is that of %s: %w", name, &oneLine{err})
	}
	return &delegate{credential: cred, name: name}, nil
}

const workloadName = "workloadidentity"

// isWorkload reports whether the environment is that of a pod with a workload
// identity.
func isWorkload() bool {
	for _, name := range []string{"AZURE_FEDERATED_TOKEN_FILE", "AZURE_CLIENT_ID", "AZURE_TENANT_ID"} {
		if os.Getenv(name) == "" {
			return false
		}
	}
	return true
}

// workload returns the issuer of a pod's workload identity.
func (h *host) workload() (issuer, error) {
	options := azidentity.WorkloadIdentityCredentialOptions{}
	options.Transport = h.transport
	switch id := h.id.(type) {
	case nil:
	case azidentity.ClientID:
		options.ClientID = id.String()
	default:
		return nil, fmt.Errorf("the environment is that of an AKS workload identity, which Credential.ID "+
			"selects by azidentity.ClientID only, not by %T; to be an identity of the node, set "+
			"Credential.Upstream to azidentity's ManagedIdentityCredential", id)
	}
	return &workloads{make: func() (azcore.TokenCredential, error) {
		return azidentity.NewWorkloadIdentityCredential(&options)
	}}, nil
}

// workloads has a credential for each resource. azidentity's holds a lock while
// it asks Entra, so that with one for all, a request that is stuck would hold up
// those for other resources.
type workloads struct {
	make func() (azcore.TokenCredential, error)

	mu        sync.Mutex // guards delegates
	delegates map[string]*delegate
}

func (w *workloads) source() string { return workloadName }

func (w *workloads) issue(ctx context.Context, resource string, r round) (*token, error) {
	d, err := w.delegate(resource)
	if err != nil {
		return nil, err
	}
	return d.issue(ctx, resource, r)
}

func (w *workloads) delegate(resource string) (*delegate, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if d := w.delegates[resource]; d != nil {
		return d, nil
	}
	cred, err := w.make()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", workloadName, &oneLine{err})
	}
	d := &delegate{credential: cred, name: workloadName}
	if w.delegates == nil {
		w.delegates = map[string]*delegate{}
	}
	w.delegates[resource] = d
	return d, nil
}
