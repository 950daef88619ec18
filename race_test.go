//go:build race

package mitoken

// Stride is how much coarser simulations are run under the race detector, which
// makes them that much slower. It looks for other things than they do.
const Stride = 8
