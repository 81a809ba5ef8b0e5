"""A small Hugging Face Hub on loopback, for tests of models by name."""

import contextlib
import hashlib
import json
import re
import types
import urllib.parse

from loopback import Loopback, QuietHandler

FIRST, SECOND = "a" * 39 + "1", "b" * 39 + "2"
"""Commits."""


class Hub(Loopback):
    """Serves `repos`: name -> commit -> file -> bytes; `heads`: name -> commit of main.

    Files of more than 1,000 bytes have a sha256, as those in LFS. `rule(method, path)` breaks
    requests: ("status", 503), ("cut", n): n bytes come, ("flip",): a bit of the answer is wrong.
    """

    def __init__(self, repos, heads, gated=()):
        self.repos, self.heads, self.gated = repos, heads, gated
        self.requests, self.rule = [], lambda method, path: None
        hub = self

        class Handler(QuietHandler):
            def do_GET(self):
                with contextlib.suppress(ConnectionError):
                    hub._answer(self)

            do_HEAD = do_GET

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                self.asked = urllib.parse.parse_qs(body).get("paths") or json.loads(body)["paths"]
                self.do_GET()

        super().__init__(Handler)

    @contextlib.contextmanager
    def used(self, patch, cache):
        """huggingface_hub and v4jax use this hub and an empty cache."""
        import huggingface_hub.utils._http as http_client
        from huggingface_hub import constants

        from v4jax.storage import faults

        patch.setattr(http_client, "time", types.SimpleNamespace(sleep=lambda seconds: None))
        patch.setattr(constants, "ENDPOINT", self.url)
        where = "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + where)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(faults, "WAITS", (0.0,) * 4)
        patch.setenv("XDG_CACHE_HOME", str(cache))
        self.forget()
        yield self
        self.forget()

    @staticmethod
    def forget():
        """What a new process would not know."""
        from v4jax.storage import hub, remote

        hub._small_files.cache_clear()
        hub._all_files.cache_clear()
        hub.data_set.cache_clear()
        remote.file_system.cache_clear()

    def _answer(self, call):
        path = urllib.parse.unquote(urllib.parse.urlparse(call.path).path)
        self.requests.append((call.command, path, call.headers.get("Range")))
        act = self.rule(call.command, path) or ("pass",)
        if act[0] == "status":
            _send(call, act[1], b"{}")
            return
        found = re.fullmatch(
            r"/api/(?:models|datasets)/([^/]+/[^/]+)(/(revision|tree|paths-info)/([^/]+)(/.+)?)?",
            path,
        )
        if found:
            query = urllib.parse.parse_qs(urllib.parse.urlparse(call.path).query)
            deep = query.get("recursive", ["false"])[0].lower() == "true"
            folder = (found[5] or "").strip("/")
            self._api(call, found[1], found[3] or "revision", found[4] or "main", folder, deep)
            return
        found = re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if found:
            self._file(call, act, found[1], found[2], found[3])
            return
        _send(call, 404, b"{}")

    def _api(self, call, name, kind, revision, folder, deep):
        if name not in self.repos:
            _send(call, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif name in self.gated:
            _send(call, 401, b"{}", {"X-Error-Code": "GatedRepo"})
        elif self._commit(name, revision) not in self.repos[name]:
            _send(call, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif folder and not any(
            file.startswith(f"{folder}/") for file in self.repos[name][self._commit(name, revision)]
        ):
            _send(call, 404, b"{}", {"X-Error-Code": "EntryNotFound"})
        else:
            files = self.repos[name][self._commit(name, revision)]
            head = {"id": name, "sha": self._commit(name, revision), "private": False}
            head |= {"tags": [], "downloads": 0, "likes": 0}
            siblings = [{"rfilename": file} for file in files]
            listed = _tree(files, f"{folder}/" if folder else "", deep)
            if kind == "paths-info":
                listed = [_listed(one, files[one]) for one in files if one in call.asked]
            value = head | {"siblings": siblings} if kind == "revision" else listed
            _send(call, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, call, act, name, revision, file):
        commit = self._commit(name, revision)
        data = self.repos.get(name, {}).get(commit, {}).get(file)
        if data is None:
            _send(call, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        head = {"ETag": f'"{_hash(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if len(data) > 1000:
            head |= {"X-Linked-Etag": f'"{_hash(data)}"', "X-Linked-Size": str(len(data))}
        status, part = 200, data
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range") or ""):
            first = int(wanted[1])
            last = min(int(wanted[2] or len(data)), len(data) - 1)
            status, part = 206, data[first : last + 1]
            head["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        if act[0] == "flip":
            part = bytes([part[0] ^ 1]) + part[1:]
        _send(call, status, part, head, act[1] if act[0] == "cut" else None)

    def _commit(self, name, revision):
        return self.heads.get(name, "") if revision == "main" else revision


def _hash(data):
    return hashlib.sha256(data).hexdigest() if len(data) > 1000 else hashlib.sha1(data).hexdigest()


def _tree(files, folder, deep):
    """What the Hub lists in a folder: files and folders there, or also below them."""
    below = {file: data for file, data in files.items() if file.startswith(folder)}
    parts = [file[len(folder) :].split("/")[:-1] for file in below]
    folders = {folder + "/".join(part[:n]) for part in parts for n in range(1, len(part) + 1)}
    listed = [_listed(file, data) for file, data in below.items()]
    listed += [{"type": "directory", "path": one, "size": 0, "oid": ""} for one in sorted(folders)]
    return [one for one in listed if deep or "/" not in one["path"][len(folder) :]]


def _listed(file, data):
    one = {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if len(data) > 1000:
        one["lfs"] = {"oid": _hash(data), "size": len(data), "pointerSize": 130}
    return one


def _send(call, status, data, head=None, cut=None):
    call.send_response_only(status)
    for name, value in (head or {}).items():
        call.send_header(name, value)
    call.send_header("Content-Length", str(len(data)))
    call.end_headers()
    if call.command != "HEAD":
        call.wfile.write(data[:cut])
    if cut is not None:
        call.close_connection = True
