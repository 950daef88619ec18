package imdsfake

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strconv"
	"syscall"
	"time"
)

// This file is what a fault does to a request and to its answer, in memory and
// over a connection.

// refuse is the dial that fails.
func (h *Handler) refuse(c *call, f Fault) error {
	h.journalize(c, c.failed(f))
	if err := sleep(c.Context(), f.latency()); err != nil {
		return err
	}
	return &net.OpError{Op: "dial", Net: "tcp", Addr: address(c.URL.Host),
		Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
}

var errReset = &net.OpError{Op: "read", Net: "tcp",
	Err: os.NewSyscallError("read", syscall.ECONNRESET)}

// address is a [net.Addr] for the text of an error.
type address string

func (address) Network() string  { return "tcp" }
func (a address) String() string { return string(a) }

// failed is the entry of a request whose connection fails.
func (c *call) failed(f Fault) Request {
	entry := c.entry
	entry.Error, entry.Reason = string(f.Failure), "a fault: "+string(f.Failure)
	if f.Failure == left {
		entry.Error, entry.Reason = "", "the client left"
	}
	if f.Failure != Truncate && f.Failure != ResetBody {
		entry.Status = 0
	}
	return entry
}

// befall makes a request wait, and returns the answer of a fault that has one of
// its own.
func (f Fault) befall(c *call) (answer, bool) {
	if sleep(c.Context(), f.latency()) != nil {
		f.Failure = left
		return answer{spoil: f}, true
	}
	switch {
	case f.Failure == Reset, f.Failure == Refuse:
		return answer{spoil: f}, true
	case f.Status != 0:
		a := refusal(c, statusProblem(f.Status))
		c.entry.Reason = "a fault: " + strconv.Itoa(f.Status)
		if f.Status < 400 {
			c.entry.Error = ""
		}
		a.spoil = f
		return a.garble(), true
	}
	return answer{}, false
}

func (f Fault) latency() time.Duration {
	if f.Jitter > 0 {
		return f.Latency + rand.N(f.Jitter)
	}
	return f.Latency
}

// statusProblem is what a status code means, by "How to use managed identities
// for Azure resources on an Azure VM to acquire an access token" (Microsoft),
// error handling.
func statusProblem(status int) *problem {
	p := &problem{status: status, code: "invalid_request", text: "One or more of the request parameters was incorrect"}
	switch {
	case status == http.StatusNotFound:
		p.code, p.text = "not_found", "IMDS endpoint is updating"
	case status == http.StatusGone:
		p.code, p.text = "gone", "IMDS is going through updates"
	case status == http.StatusTooManyRequests:
		p.code, p.text = "too_many_requests", "IMDS Throttle limit reached"
	case status >= 500:
		p.code, p.text = "unknown", "Failed to retrieve token from the Active directory. For details see logs in "+
			"C:\\WindowsAzure\\Logs\\Plugins\\Microsoft.Azure.ManagedIdentity"
	}
	return p
}

// garbles tells whether a fault changes an answer.
func (f Fault) garbles() bool {
	return f.Body != "" || f.RetryAfter != "" || f.Gzip || f.Pad > 0 || len(f.Header) > 0 || len(f.Fields) > 0
}

// garble does to an answer what its fault says.
func (a answer) garble() answer {
	f := a.spoil
	if f.Body != "" {
		a.body = []byte(f.Body)
	}
	a.body = f.replaceFields(a.body)
	if f.Pad > 0 {
		a.body = append(a.body, bytes.Repeat([]byte(" "), f.Pad)...)
	}
	if f.Gzip {
		a.body = compressed(a.body)
		a.header.Set("Content-Encoding", "gzip")
	}
	if f.RetryAfter != "" {
		a.header.Set("Retry-After", f.RetryAfter)
	}
	for name, value := range f.Header {
		a.header.Del(name)
		if value != "" {
			a.header.Set(name, value)
		}
	}
	return a
}

func (f Fault) replaceFields(body []byte) []byte {
	var fields map[string]any
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	if len(f.Fields) == 0 || d.Decode(&fields) != nil {
		return body
	}
	for name, value := range f.Fields {
		if value == nil {
			delete(fields, name)
		} else {
			fields[name] = value
		}
	}
	return jsonAnswer(0, fields).body
}

func compressed(body []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, _ = w.Write(body) // a Buffer takes everything
	_ = w.Close()
	return b.Bytes()
}

// end is how many bytes of a body arrive.
func (f Fault) end(body []byte) int {
	switch {
	case f.After < 0:
		return 0
	case f.After == 0:
		return len(body) / 2
	}
	return max(0, min(f.After, len(body)-1)) // it does break off
}

// write sends the answer over a connection, with what the fault does to it.
func (a answer) write(w http.ResponseWriter, r *http.Request) {
	f := a.spoil
	switch f.Failure {
	case Refuse, Reset, Hang, left:
		reset(w)
		return
	}
	maps.Copy(w.Header(), a.header)
	if w.Header().Get("Content-Type") == "" {
		w.Header()["Content-Type"] = nil // or net/http would guess one
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(a.body)))
	w.WriteHeader(a.status)
	_, err := io.Copy(flushing{w, f.Drip > 0}, a.reader(r.Context()))
	_ = http.NewResponseController(w).Flush()
	switch {
	case f.Failure == ResetBody:
		reset(w)
	case errors.Is(err, io.ErrUnexpectedEOF):
		panic(http.ErrAbortHandler) // which closes the connection
	}
}

// flushing is a ResponseWriter that sends each byte on its way.
type flushing struct {
	http.ResponseWriter
	at bool // once
}

func (w flushing) Write(b []byte) (int, error) {
	n, err := w.ResponseWriter.Write(b)
	if err == nil && w.at {
		err = http.NewResponseController(w.ResponseWriter).Flush()
	}
	return n, err
}

// reader returns the body as it arrives.
func (a answer) reader(ctx context.Context) io.Reader {
	var body io.Reader = bytes.NewReader(a.body)
	switch a.spoil.Failure {
	case Truncate:
		body = io.MultiReader(bytes.NewReader(a.body[:a.spoil.end(a.body)]), broken{io.ErrUnexpectedEOF})
	case ResetBody:
		body = io.MultiReader(bytes.NewReader(a.body[:a.spoil.end(a.body)]), broken{errReset})
	}
	if a.spoil.Drip > 0 {
		return &dripping{ctx, body, a.spoil.Drip}
	}
	return body
}

// broken is the rest of a body that breaks off.
type broken struct{ err error }

func (b broken) Read([]byte) (int, error) { return 0, b.err }

// dripping is a body that comes byte by byte.
type dripping struct {
	ctx  context.Context
	body io.Reader
	gap  time.Duration
}

func (d *dripping) Read(b []byte) (int, error) {
	if err := sleep(d.ctx, d.gap); err != nil {
		return 0, err
	}
	return d.body.Read(b[:min(1, len(b))])
}

// sleep waits for d, or until ctx is done, which is its error.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// reset closes the connection of a request without an answer, or in the middle
// of one, with a RST where it can.
func reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if t, ok := conn.(interface{ NetConn() net.Conn }); ok {
		conn = t.NetConn() // below TLS
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}
