package imdsfake

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
)

// A Server is a Handler on a port of the loopback interface, to be used as
// [net/http/httptest.Server] is. Its methods are safe for concurrent use.
type Server struct {
	// URL is its base URL, of the form http://127.0.0.1:port: an endpoint for
	// clients that can be given one. For others there is [Server.Client].
	URL string

	// Handler is what it serves.
	Handler *Handler

	server *http.Server
	stop   context.CancelFunc // releases requests that hang
	client *http.Client
	secure func() string // starts to listen for https, once, and returns the address
	done   sync.WaitGroup
}

// NewServer starts a Server. If h is nil, it serves a zero Handler. Call Close
// to end it.
func NewServer(h *Handler) *Server {
	if h == nil {
		h = new(Handler)
	}
	h.ready()
	ctx, stop := context.WithCancel(context.Background())
	s := &Server{Handler: h, server: &http.Server{Handler: h}, stop: stop}
	s.server.BaseContext = func(net.Listener) context.Context { return ctx }
	s.server.ErrorLog = log.New(io.Discard, "", 0) // clients may break off what they like
	s.secure = sync.OnceValue(func() string {
		return s.listen(func(l net.Listener) net.Listener {
			return tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{h.Certificate()}})
		})
	})
	addr := s.listen(func(l net.Listener) net.Listener { return l })
	s.URL = "http://" + addr
	s.client = &http.Client{Transport: &clientTransport{h, s.transport(addr)}}
	return s
}

// listen serves on a port that is free, and returns its address.
func (s *Server) listen(wrap func(net.Listener) net.Listener) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic("imdsfake: " + err.Error())
	}
	s.done.Go(func() { _ = s.server.Serve(wrap(l)) }) // ErrServerClosed
	return l.Addr().String()
}

// transport connects to the Server whatever it is asked for.
func (s *Server) transport(addr string) *http.Transport {
	dial := func(ctx context.Context, addr string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", addr)
	}
	return &http.Transport{
		DisableCompression: true, // or net/http would undo a fault
		DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx, addr) },
		DialTLSContext: func(ctx context.Context, _, name string) (net.Conn, error) {
			conn, err := dial(ctx, s.secure())
			if err != nil {
				return nil, err
			}
			roots := x509.NewCertPool()
			roots.AddCert(s.Handler.Certificate().Leaf)
			host, _, _ := net.SplitHostPort(name)
			return tls.Client(conn, &tls.Config{RootCAs: roots, ServerName: host}), nil
		},
	}
}

// TLSURL is the base URL for https, of the form https://127.0.0.1:port. Its
// certificate is [Handler.Certificate]. The Server listens there from the first
// call on.
func (s *Server) TLSURL() string { return "https://" + s.secure() }

// Env returns the environment variables by which clients find the Server in the
// place of a host: see [Handler.Env].
func (s *Server) Env(host Host) map[string]string {
	if host == ServiceFabric || host == Entra {
		return s.Handler.Env(host, s.TLSURL())
	}
	return s.Handler.Env(host, s.URL)
}

// Client returns a client whose every connection goes to the Server, whatever
// host it asks for: so that the default endpoint of whatever is tested,
// http://169.254.169.254, is tested as it is, and the names of Entra and
// Microsoft Graph lead there, over https. It asks no proxy.
func (s *Server) Client() *http.Client { return s.client }

// Close ends the Server, its connections, and the requests that hang, and closes
// the Handler.
func (s *Server) Close() {
	s.stop()
	_ = s.server.Close()
	s.client.CloseIdleConnections()
	s.done.Wait()
	s.Handler.Close()
}

// clientTransport is the transport of Server.Client. It sees to it that a
// connection is refused where a fault says so, which a listener cannot do.
type clientTransport struct {
	handler *Handler
	base    *http.Transport
}

func (t *clientTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	body, err := readBody(r)
	if err != nil {
		return nil, err
	}
	if err := sendable(r); err != nil {
		return nil, err
	}
	r = r.Clone(r.Context())
	if r.Header == nil {
		r.Header = http.Header{}
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	c := t.handler.newCall(r)
	f, from := t.handler.draw(c)
	if f.Failure == Refuse {
		return nil, t.handler.refuse(c, f)
	}
	ticket := unique()
	t.handler.drawns.Store(ticket, &draw{fault: f, from: from})
	defer t.handler.drawns.Delete(ticket) // once the request has been answered, or lost
	r.Header.Set(ticketHeader, ticket)
	r.Body = io.NopCloser(bytes.NewReader(body))
	if len(body) == 0 {
		r.Body = http.NoBody
	}
	return t.base.RoundTrip(r)
}

func readBody(r *http.Request) ([]byte, error) {
	if r.Body == nil {
		return nil, nil
	}
	defer r.Body.Close()
	stop := context.AfterFunc(r.Context(), func() { r.Body.Close() }) // or the read might not end
	defer stop()
	return io.ReadAll(r.Body)
}

func (t *clientTransport) CloseIdleConnections() { t.base.CloseIdleConnections() }
