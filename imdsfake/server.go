package imdsfake

import (
	"context"
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

	listener net.Listener
	server   *http.Server
	stop     context.CancelFunc // releases requests that hang
	client   *http.Client
	done     sync.WaitGroup
}

// NewServer starts a Server. If h is nil, it serves a zero Handler. Call Close
// to end it.
func NewServer(h *Handler) *Server {
	if h == nil {
		h = new(Handler)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic("imdsfake: " + err.Error())
	}
	ctx, stop := context.WithCancel(context.Background())
	s := &Server{
		URL:      "http://" + l.Addr().String(),
		Handler:  h,
		listener: l,
		server:   &http.Server{Handler: h},
		stop:     stop,
	}
	s.server.BaseContext = func(net.Listener) context.Context { return ctx }
	s.client = &http.Client{Transport: &clientTransport{h, &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String())
		},
	}}}
	s.done.Go(func() { _ = s.server.Serve(l) }) // ErrServerClosed
	return s
}

// Client returns a client whose every connection goes to the Server, whatever
// host it asks for: so that the default endpoint of whatever is tested,
// http://169.254.169.254, is tested as it is. It asks no proxy.
func (s *Server) Client() *http.Client { return s.client }

// Close ends the Server, its connections, and the requests that hang.
func (s *Server) Close() {
	s.stop()
	_ = s.server.Close()
	s.client.CloseIdleConnections()
	s.done.Wait()
}

// clientTransport is the transport of Server.Client. It sees to it that a
// connection is refused where a fault says so, which a listener cannot do.
type clientTransport struct {
	handler *Handler
	base    *http.Transport
}

func (t *clientTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := t.handler.refuse(r); err != nil {
		if r.Body != nil {
			_ = r.Body.Close()
		}
		return nil, err
	}
	return t.base.RoundTrip(r)
}

func (t *clientTransport) CloseIdleConnections() { t.base.CloseIdleConnections() }
