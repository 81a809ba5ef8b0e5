"""A proxy on loopback before an object store, which breaks requests, delays and counts them."""

import contextlib
import http.client
import re
import threading
import time

from loopback import Loopback, QuietHandler

SKIPPED = {"connection", "content-length", "expect", "transfer-encoding"}
"""Headers that the proxy writes itself."""


class Proxy(Loopback):
    """A loopback HTTP proxy before a store, for one `with` block.

    `rule(method, path)`, where an upload's path ends with the object's name, says what happens to a
    request: None (it passes), ("status", 503), ("cut", n): only n bytes of the answer's body come,
    ("drop",): the store is not asked, ("lost",): the store acts and its answer does not come,
    ("delay", seconds), ("then", function): the store acts, and the function is called before its
    answer comes.

    Part of an upload to GCS that comes twice is passed on once: GCS ignores bytes that it has, and
    fake-gcs-server would append them.

    What is sent waits for a link of so many bytes a second, which all requests share.

    Attributes:
      requests: (method, path, bytes of the answer) of all requests.
    """

    def __init__(self, upstream, rule=lambda method, path: None, bytes_per_second=float("inf")):
        self.rule, self.requests, self._parts = rule, [], {}
        self._seconds, self._free, self._lock = 1 / bytes_per_second, 0.0, threading.Lock()
        self._upstream = upstream.removeprefix("http://")
        proxy = self

        class Handler(QuietHandler):
            def handle_one_request(self):
                try:
                    super().handle_one_request()
                except (OSError, http.client.HTTPException):
                    self.close_connection = True  # else the client waits for an answer

            def handle_expect_100(self):
                goes_on = super().handle_expect_100()
                self.wfile.flush()
                return goes_on

            def __getattr__(self, name):
                if name.startswith("do_"):
                    return lambda: proxy._forward(self)
                raise AttributeError(name)

        super().__init__(Handler)

    def _forward(self, call):
        body = self._body(call)
        named = call.path
        if "uploadType=multipart" in call.path:  # gcsfs gives the object's name in the body
            named += "&name=" + re.search(rb'"name": *"([^"]+)"', body)[1].decode()
        act = self.rule(call.command, named) or ("pass",)
        if act[0] == "drop":
            call.close_connection = True
            return
        if act[0] == "status":
            text = b'{"error": {"code": %d, "message": "injected"}}' % act[1]
            self._answer(call, act[1], [("Content-Type", "application/json")], text, len(text))
            return
        if act[0] == "delay":
            time.sleep(act[1])
        self._take_the_link(len(body))
        part = call.path, call.headers.get("Content-Range")
        known = self._parts.get(part) if "upload_id=" in call.path else None
        status, head, data, length = known or self._ask(call, body)
        if part[1] is not None and status < 400:
            self._parts[part] = status, head, data, length
        self.requests.append((call.command, named, len(data)))
        if act[0] == "then":
            act[1]()
        if act[0] == "lost":
            call.close_connection = True
            return
        if act[0] == "cut":
            data = data[: act[1]]
            call.close_connection = True
        self._answer(call, status, head, data, length)

    def _take_the_link(self, count):
        """Waits as long as `count` bytes take on a link that all requests share."""
        with self._lock:
            now = time.monotonic()
            self._free = max(now, self._free) + count * self._seconds
            seconds = self._free - now
        time.sleep(seconds)

    @staticmethod
    def _body(call):
        if "chunked" not in call.headers.get("Transfer-Encoding", ""):
            return call.rfile.read(int(call.headers.get("Content-Length") or 0))
        parts = []
        while count := int(call.rfile.readline().split(b";")[0], 16):
            parts.append(call.rfile.read(count))
            call.rfile.readline()
        call.rfile.readline()
        return b"".join(parts)

    def _ask(self, call, body):
        store = http.client.HTTPConnection(self._upstream, timeout=60)
        with contextlib.closing(store):
            store.putrequest(call.command, call.path, skip_host=True, skip_accept_encoding=True)
            for name, value in call.headers.items():
                if name.lower() not in SKIPPED:
                    store.putheader(name, value)
            store.putheader("Content-Length", str(len(body)))
            store.endheaders(body)
            answer = store.getresponse()
            data = answer.read()
            length = answer.headers.get("Content-Length", "0")
            head = [one for one in answer.headers.items() if one[0].lower() not in SKIPPED]
        return answer.status, head, data, length if call.command == "HEAD" else len(data)

    @staticmethod
    def _answer(call, status, head, data, length):
        call.send_response_only(status)
        for name, value in head:
            call.send_header(name, value)
        call.send_header("Content-Length", str(length))
        call.end_headers()
        if call.command != "HEAD":
            call.wfile.write(data)
