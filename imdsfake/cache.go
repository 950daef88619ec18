package imdsfake

import "time"

// A Cache is how long IMDS gives out a token again. Only the first one is
// documented ("How to use managed identities for Azure resources on an Azure VM
// to acquire an access token", Microsoft, token caching); the others are what
// clients must live with.
type Cache string

const (
	// UntilExpiry: the same token until it has expired. A new app role is in
	// none before that.
	UntilExpiry Cache = "until-expiry"

	// UntilHalfLife: the same token until half its life is over.
	UntilHalfLife Cache = "until-half-life"

	// UntilLastMinutes: the same token until 5 minutes of it are left.
	UntilLastMinutes Cache = "until-last-minutes"

	// NoCache: a new token each time.
	NoCache Cache = "none"

	// Alternating: two caches take turns, each as UntilHalfLife.
	Alternating Cache = "alternating"

	// OlderAfterNewer: a new token, and then the one before it, in turn.
	OlderAfterNewer Cache = "older-after-newer"

	// AgedFirst: as UntilLastMinutes, but 23/24 of the life of the first token
	// are over already.
	AgedFirst Cache = "aged-first"
)

var caches = []Cache{"", UntilExpiry, UntilHalfLife, UntilLastMinutes, NoCache, Alternating, OlderAfterNewer, AgedFirst}

// cacheKey is what tokens are cached by.
type cacheKey struct{ objectID, resource string }

// cached are the tokens that there are for a key.
type cached struct {
	slots [2]issuedToken
	asked int // times
}

// next returns the slot that a request is served from, and whether the token in
// it is given out again.
func (k *cached) next(c Cache, now time.Time) (slot *issuedToken, again bool) {
	k.asked++
	slot = &k.slots[0]
	left := func() time.Duration { return slot.expiry.Sub(now) }
	half := func() time.Duration { return slot.expiry.Sub(slot.issued) / 2 }
	switch c {
	case NoCache:
		return slot, false
	case UntilHalfLife:
		return slot, left() > half()
	case UntilLastMinutes, AgedFirst:
		return slot, left() > 5*time.Minute
	case Alternating:
		slot = &k.slots[(k.asked-1)%2]
		return slot, left() > half()
	case OlderAfterNewer:
		if k.asked > 1 && k.asked%2 == 1 {
			slot = &k.slots[1]
			return slot, left() > 0
		}
		k.slots[1] = k.slots[0]
		return slot, false
	}
	return slot, left() > 0
}

// shares tells whether requests at the same time get one token.
func (c Cache) shares() bool { return c != NoCache && c != OlderAfterNewer }

// Limits are how many requests IMDS takes, for all processes of a machine
// together. It answers those beyond them with 429. A virtual machine has
// Limits{PerSecond: 20, AtOnce: 5} for tokens ("Azure Instance Metadata Service
// for virtual machines", Microsoft, rate limiting).
type Limits struct {
	PerSecond int `json:"perSecond"` // in any second; if zero, as many as come
	AtOnce    int `json:"atOnce"`    // under way; if zero, as many as come
}

// load is what the limits are for.
type load struct {
	under  int
	starts []time.Time // in the last second
}

// enter takes a request, unless there are too many. What it returns says so, or
// is to be called when the request is over.
func (h *Handler) enter(c *call) (leave func(), ok bool) {
	if h.Limits == (Limits{}) || c.entry.Host != IMDS {
		return func() {}, true
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	l, now := &h.load, time.Now()
	for len(l.starts) > 0 && now.Sub(l.starts[0]) >= time.Second {
		l.starts = l.starts[1:]
	}
	if h.Limits.AtOnce > 0 && l.under >= h.Limits.AtOnce ||
		h.Limits.PerSecond > 0 && len(l.starts) >= h.Limits.PerSecond {
		return nil, false
	}
	l.under++
	l.starts = append(l.starts, now)
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		l.under--
	}, true
}
