"""An HTTP server on loopback for one `with` block: what tests' proxies and hubs have in common."""

import http.server
import threading


class QuietHandler(http.server.BaseHTTPRequestHandler):
    """Keeps connections and logs nothing."""

    protocol_version = "HTTP/1.1"
    wbufsize = 2**16  # head and body at once: Nagle would wait 40 ms

    def log_message(self, *_):
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # more connections at once than that are refused


class Loopback:
    """Attributes: url."""

    def __init__(self, handler):
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
