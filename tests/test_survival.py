"""Whole runs that are killed or moved continue as if nothing had been.

They are killed at any moment, and moved to other devices, layouts and process counts.
"""

import collections
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorstore as ts
from small_runs import small_run
from test_intact import losses, text_folder  # noqa: F401
from test_processes import MODEL as WIDE

from v4jax.data.config import DataConfig
from v4jax.train import run_steps
from v4jax.train.config import TrainConfig
from v4jax.train.loop import train
from v4jax.train.stability import StabilityConfig
from v4jax.train.stages import Stage

KILLS = 20
TESTS = pathlib.Path(__file__).parent
CONFIG = """
from {module} import config
def get_config():
    return config({text!r}, {run!r}{more})
"""


def job(
    tmp_path, name: str, code: str, *arguments: str, processes: int = 1, **environment: str
) -> subprocess.Popen:
    """One fresh process or several that train what `code` configures; one device each."""
    file = tmp_path / f"{name}.py"
    file.write_text(code)
    command = [sys.executable, "-m", "v4jax", "train", str(file), *arguments]
    if processes > 1:
        command = [
            sys.executable,
            "-m",
            "v4jax",
            "launch",
            "--processes",
            str(processes),
            "--devices",
            "1",
            "--",
            *command,
        ]
    paths = {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.Popen(
        command,
        env=os.environ | paths | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen) -> None:
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-2000:]


def lines_of(run: pathlib.Path) -> list[dict]:
    """The whole lines of metrics.jsonl, which a process may be writing."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def kill_at_a_random_moment(
    process, run, dice: random.Random, during_a_save: bool
) -> dict[int, float]:
    """Waits until this process has taken some steps, and then for a moment or for a save to begin.

    Returns the losses written until then.
    """
    begun, steps, deadline = len(lines_of(run)), dice.randint(1, 10), time.time() + 200
    while (
        len(lines_of(run)) == begun and process.poll() is None and time.time() < deadline
    ):  # a resumed run drops lines first
        time.sleep(0.005)
    begun = len(lines_of(run))
    while len(lines_of(run)) < begun + steps and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)

    def saving():
        return any("tmp" in path.name for path in (run / "checkpoints").iterdir())

    until = time.time() + (2 if during_a_save else dice.uniform(0, 0.1))
    while time.time() < until and not (during_a_save and saving()):
        time.sleep(0.001)
    time.sleep(dice.uniform(0, 0.05))
    assert process.poll() is None, process.communicate()[1][-2000:]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return {line["step"]: line["loss"] for line in lines_of(run) if "loss" in line}


@pytest.mark.slow
def test_killed_twenty_times_every_loss_is_that_of_the_run_left_alone(text_folder, tmp_path):  # noqa: F811
    run, alone, dice = tmp_path / "run", tmp_path / "alone", random.Random(0)
    more = ", steps=100_000, eval_batches=0, checkpoint_every=3"
    code = CONFIG.format(module="test_intact", text=str(text_folder), run=str(run), more=more)
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    seen = collections.defaultdict(set)
    for i in range(KILLS):
        found = kill_at_a_random_moment(
            job(tmp_path, "killed", code, **cache), run, dice, during_a_save=i % 2 == 0
        )
        for step, loss in found.items():
            seen[step].add(loss)
    last = max(seen) + 3
    assert max(seen) > KILLS  # runs resumed from checkpoints
    finished(job(tmp_path, "killed", code, "--steps", str(last), **cache))
    finished(
        job(
            tmp_path,
            "alone",
            code.replace(repr(str(run)), repr(str(alone))),
            "--steps",
            str(last),
            **cache,
        )
    )
    assert [line["step"] for line in lines_of(run)] == list(range(1, last + 1))
    assert losses(run) == losses(alone)
    assert all(seen[step] == {loss} for step, loss in losses(alone).items() if step in seen)
    for name in ("config.json", "tokenizer.json", "tensorboard", "loss.png"):
        assert (run / name).exists(), name
    assert not any("tmp" in path.name for path in (run / "checkpoints").iterdir())


EVERYTHING = """
from test_survival import everything
def get_config():
    return everything({text!r}, {run!r})
"""


def everything(text, run, **changes) -> TrainConfig:
    """A run that is always in the middle of something.

    Micro-batches of packed rows on 2 devices, three stages, all low precision of the optimizer, and
    a made-up spike in step 5, after which experts are chosen two steps ahead up to step 14.
    """
    real = run_steps.spike

    def spike(config, history, loss, norm):
        first = len(history.losses) == 4 and history.rollbacks == 0
        return "made up" if first else real(config, history, loss, norm)

    run_steps.spike = spike
    fields = dict(
        model=dataclasses.replace(WIDE, num_hash_layers=0),
        data=DataConfig(source=str(text), held_out=0.2, packing="best_fit"),
        mesh="fsdp=2",
        layout="fsdp",
        steps=100_000,
        gradient_accumulation=2,
        seq_len=40,
        attention="dense",
        index_learning_rate=1e-3,
        momentum_dtype="bfloat16",
        moment_dtype="bfloat16",
        newton_schulz_dtype="bfloat16",
        remat="dots",
        checkpoint_every=3,
        keep=3,
        eval_every=4,
        eval_batches=1,
        stability=StabilityConfig(rollbacks=1, anticipate=9, anticipate_lag=2),
        stages=(
            Stage(after=7, batch_size=16, gradient_accumulation=4, attention="indexer"),
            Stage(after=12, seq_len=56, attention="sparse"),
        ),
    )
    return config(text, run, **fields | changes)


def told(run) -> list[dict]:
    """What metrics.jsonl says, without times."""
    timed = ("seconds_", "goodput", "tokens_per_second", "model_flops", "data_wait")
    return [
        {name: value for name, value in line.items() if not name.startswith(timed)}
        for line in lines_of(run)
    ]


def arrays(run) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint: weights, router, both optimizers, what is ahead."""
    newest = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    found = {}
    for array in (run / "checkpoints" / str(newest)).rglob("manifest.ocdbt"):
        store = ts.KvStore.open(f"file://{array.parent}/|ocdbt:").result()
        for key in store.list().result():
            found[f"{array.parent.name}/{key.decode()}"] = store.read(key).result().value
    return found


@pytest.mark.long
def test_killed_in_the_middle_of_everything_a_run_ends_as_if_left_alone(tmp_path):
    text, run, alone = tmp_path / "text", tmp_path / "run", tmp_path / "alone"
    text.mkdir()
    for i in range(40):  # several to a row, of many lengths
        (text / f"{i}.txt").write_text(f"document {i}: " + "the cat sat on the mat. " * (i % 5))
    environment = {
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    killed = EVERYTHING.format(text=str(text), run=str(run))
    dice, reached = random.Random(1), [0]
    while max(reached) < 18:
        process = job(tmp_path, "killed", killed, **environment)
        found = kill_at_a_random_moment(process, run, dice, during_a_save=len(reached) % 2 == 0)
        reached.append(max(found, default=0))
    last = max(reached) + 2
    finished(job(tmp_path, "killed", killed, "--steps", str(last), **environment))
    left_alone = EVERYTHING.format(text=str(text), run=str(alone))
    finished(job(tmp_path, "alone", left_alone, "--steps", str(last), **environment))
    assert len(reached) > 4 and told(run) == told(alone)
    lines = [line for line in told(alone) if "anticipating" in line]
    assert {line["anticipating"] for line in lines} == {0.0, 1.0}
    assert {line["stage"] for line in lines} == {0, 1, 2}
    ours, theirs = arrays(run), arrays(alone)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, content in theirs.items():
        assert ours[name] == content, name


def config(text, run, **changes) -> TrainConfig:
    """A run whose model divides over 8 devices in every layout."""
    fields = dict(
        model=WIDE,
        steps=8,
        batch_size=8,
        seq_len=24,
        learning_rate=1e-3,
        warmup_steps=0,
        log_every=1,
        checkpoint_every=2,
    )
    return small_run(text, run, **fields | changes)


STAGES = (
    ("data=2,expert=2,tensor=2", "full", 2),
    ("fsdp=4", "fsdp", 4),
    ("expert=2", "ep", 6),
    ("context=2,expert=4", "cp_ep", 8),
)


@pytest.mark.long
def test_eight_devices_then_four_then_two_then_eight(text_folder, tmp_path):  # noqa: F811
    for mesh, layout, steps in STAGES:
        train(config(text_folder, tmp_path / "moved", mesh=mesh, layout=layout, steps=steps))
    train(config(text_folder, tmp_path / "one"))
    moved, one = losses(tmp_path / "moved"), losses(tmp_path / "one")
    assert list(moved) == list(range(1, 9))
    np.testing.assert_allclose([moved[step] for step in one], list(one.values()), rtol=1e-5)


@pytest.mark.long
def test_two_processes_then_one_then_two(text_folder, tmp_path):  # noqa: F811
    code = CONFIG.format(
        module="test_survival",
        text=str(text_folder),
        run=str(tmp_path / "moved"),
        more=", mesh='data=2', layout='dp'",
    )
    finished(job(tmp_path, "two", code, "--steps", "3", processes=2))
    train(config(text_folder, tmp_path / "moved", steps=5))
    finished(job(tmp_path, "two", code, processes=2))
    train(config(text_folder, tmp_path / "one"))
    moved, one = losses(tmp_path / "moved"), losses(tmp_path / "one")
    assert list(moved) == list(range(1, 9))
    np.testing.assert_allclose([moved[step] for step in one], list(one.values()), rtol=1e-5)
