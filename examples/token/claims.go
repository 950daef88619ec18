package main

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"
	"time"
)

// errOpaque is the error for a token without claims to show. Services that check
// their tokens in their own way may be issued such ones.
var errOpaque = errors.New("the token is opaque: it is no JWT, and only its service can read it")

// decodeClaims returns the claims of a JWT (RFC 7519), and for each that is a
// time a second one, named *_utc, that people can read.
//
// It does not check the signature, so what it returns is for eyes only: who
// decides by the claims of a token must verify it, as examples/quickstart does.
func decodeClaims(token string) (map[string]any, error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil, errOpaque
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return nil, errOpaque
	}
	d := json.NewDecoder(strings.NewReader(string(payload)))
	d.UseNumber() // 1795433000, not 1.795433e+09
	var claims map[string]any
	if d.Decode(&claims) != nil || claims == nil {
		return nil, errOpaque
	}
	for _, name := range []string{"iat", "nbf", "exp"} {
		if n, ok := claims[name].(json.Number); ok {
			if sec, err := n.Int64(); err == nil {
				claims[name+"_utc"] = time.Unix(sec, 0).UTC().Format(time.RFC3339)
			}
		}
	}
	return claims, nil
}
