//go:build !race

package mitoken

const Stride = 1
