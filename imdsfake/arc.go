package imdsfake

import (
	"cmp"
	"crypto/subtle"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// This file is how the agent of Azure Arc knows whom to trust: whoever can read a
// file that it has just written.

// arcKeyDir is where clients read key files.
func arcKeyDir() string {
	if runtime.GOOS == "windows" {
		return filepath.Join(os.Getenv("ProgramData"), "AzureConnectedMachineAgent", "Tokens")
	}
	return "/var/opt/azcmagent/tokens"
}

// arcKeysKept is how many key files there are at most. The oldest one goes first.
const arcKeysKept = 20

// arcKey is a key file that has not been used.
type arcKey struct{ path, secret string }

// checkArc takes a request that proves that it can read a key file, and
// challenges one that does not try.
func checkArc(h *Handler, c *call) *problem {
	if c.Header.Get("Metadata") != "true" {
		return &problem{status: 400, code: "bad_request_102", text: "Required metadata header not specified"}
	}
	secret, ok := strings.CutPrefix(c.Header.Get("Authorization"), "Basic ")
	if !ok {
		return h.challenge()
	}
	if !h.useKey(secret) {
		return &problem{status: 401, code: "unauthorized_client", text: "The key is not one of those that were written"}
	}
	return nil
}

// challenge writes a key file, and says where it is.
func (h *Handler) challenge() *problem {
	key := arcKey{filepath.Join(cmp.Or(h.KeyDir, arcKeyDir()), guid(unique())+".key"), unique()}
	if err := os.WriteFile(key.path, []byte(key.secret), 0o640); err != nil {
		return &problem{status: 500, code: "unknown", text: fmt.Sprintf(
			"The key file cannot be written; see Handler.KeyDir: %v", err)}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.arcKeys = append(h.arcKeys, key)
	if len(h.arcKeys) > arcKeysKept {
		_ = os.Remove(h.arcKeys[0].path) // which may be gone
		h.arcKeys = h.arcKeys[1:]
	}
	return &problem{status: 401, code: "unauthorized_client", text: "A key is required: the content of the file",
		header: http.Header{"Www-Authenticate": {"Basic realm=" + key.path}}}
}

// useKey tells whether a key is one that was written, which is good once.
func (h *Handler) useKey(secret string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	i := slices.IndexFunc(h.arcKeys, func(k arcKey) bool {
		return subtle.ConstantTimeCompare([]byte(k.secret), []byte(secret)) == 1
	})
	if i < 0 {
		return false
	}
	_ = os.Remove(h.arcKeys[i].path)
	h.arcKeys = slices.Delete(h.arcKeys, i, i+1)
	return true
}

// Close removes the key files of Azure Arc that nobody has used. A Handler that
// no client on such a host has asked needs no Close.
func (h *Handler) Close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, k := range h.arcKeys {
		_ = os.Remove(k.path)
	}
	h.arcKeys = nil
}
