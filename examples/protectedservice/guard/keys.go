package guard

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// This file is the keys that tokens are signed with. They are kept while Entra is
// down, or the endurance of clients would be worth nothing, and are asked for no
// more often than is good for it: whoever sends tokens can make up key IDs.

const (
	keysMaxAge  = 24 * time.Hour   // Microsoft: "check for updates every 24 hours"
	keysMinWait = 30 * time.Second // between requests, whatever tokens say
	keysTimeout = 5 * time.Second
	keysLimit   = 1 << 20 // bytes
)

// A keySet is an [oidc.KeySet].
type keySet struct {
	url    string
	client *http.Client
	tenant string

	mu      sync.Mutex // guards what follows
	keys    map[string]any
	fetched time.Time     // when the keys came
	asked   time.Time     // when they were last asked for
	arrives chan struct{} // closed when a request is over; nil if none is under way
	err     error         // of the last request
}

func newKeySet(url string, client *http.Client, tenant string) *keySet {
	if client == nil {
		client = &http.Client{Timeout: keysTimeout}
	}
	return &keySet{url: url, client: client, tenant: tenant}
}

// VerifySignature implements [oidc.KeySet].
func (s *keySet) VerifySignature(ctx context.Context, token string) ([]byte, error) {
	jws, err := jose.ParseSigned(token, []jose.SignatureAlgorithm{jose.RS256})
	if err != nil {
		return nil, err
	}
	if len(jws.Signatures) != 1 {
		return nil, errors.New("it has more than one signature")
	}
	key, err := s.key(ctx, jws.Signatures[0].Header.KeyID)
	if err != nil {
		return nil, err
	}
	return jws.Verify(key)
}

// key returns a key by its ID. One that is known is good while newer ones are asked
// for; for one that is not, it is worth to wait.
func (s *keySet) key(ctx context.Context, id string) (any, error) {
	s.mu.Lock()
	key, ok := s.keys[id]
	arrives := s.arrives
	if !ok || time.Since(s.fetched) > keysMaxAge {
		arrives = s.ask()
	}
	err := s.err
	s.mu.Unlock()
	if ok {
		return key, nil
	}
	if arrives == nil {
		return nil, errors.Join(fmt.Errorf("the key %q is not known", id), err)
	}
	select {
	case <-arrives:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if key, ok := s.keys[id]; ok {
		return key, nil
	}
	return nil, errors.Join(fmt.Errorf("the key %q is not known", id), s.err)
}

// ask sends a request, unless one is under way or was sent just before. What it
// returns is closed when it is over; nil if there is none. s.mu is held.
func (s *keySet) ask() chan struct{} {
	if s.arrives != nil {
		return s.arrives
	}
	if !s.asked.IsZero() && time.Since(s.asked) < keysMinWait {
		return nil
	}
	s.asked = time.Now()
	arrives := make(chan struct{})
	s.arrives = arrives
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), keysTimeout)
		defer cancel()
		keys, err := s.fetch(ctx)
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.err = err; err == nil {
			s.keys, s.fetched = keys, time.Now() // those that were withdrawn go
		}
		s.arrives = nil
		close(arrives)
	}()
	return arrives
}

// fetch returns the keys that are published (RFC 7517). An issuer beside a key is
// the only one that it is good for ("Access tokens in the Microsoft identity
// platform", Microsoft, validate the issuer of the signing key).
func (s *keySet) fetch(ctx context.Context) (map[string]any, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, keysLimit))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s answered %s", s.url, resp.Status)
	}
	var set struct{ Keys []json.RawMessage }
	if err := json.Unmarshal(body, &set); err != nil {
		return nil, fmt.Errorf("%s: %w", s.url, err)
	}
	keys := map[string]any{}
	for _, text := range set.Keys {
		var key jose.JSONWebKey
		var of struct{ Issuer string }
		if json.Unmarshal(text, &key) != nil || json.Unmarshal(text, &of) != nil {
			continue // of a kind that is not known yet: it signs nothing for us
		}
		mine := of.Issuer == "" || strings.Contains(of.Issuer, "{tenantid}") || strings.Contains(of.Issuer, s.tenant)
		if mine && key.IsPublic() && key.Use != "enc" && key.KeyID != "" {
			keys[key.KeyID] = key.Key
		}
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("%s has no keys", s.url)
	}
	return keys, nil
}
