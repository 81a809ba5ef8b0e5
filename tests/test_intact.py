"""Nothing is lost: damage is noticed, SIGTERM saves, a full disk or another model is an error."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from commands import programs_compiled_here
from small_runs import small_run, write_text
from trees import random_params, small_config

import v4jax
from v4jax.checkpoint.checksums import damage, write_sums
from v4jax.checkpoint.store import Store
from v4jax.cli import main as cli
from v4jax.train.config import TrainConfig
from v4jax.train.loop import train

MODEL = small_config(
    vocab_size=260,
    num_hidden_layers=2,
    compress_ratios=(0, 4),
    num_hash_layers=1,
    num_nextn_predict_layers=0,
    hidden_size=32,
    moe_intermediate_size=32,
)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def config(text_folder, run, **changes) -> TrainConfig:
    fields = dict(
        model=MODEL,
        steps=6,
        seq_len=24,
        warmup_steps=0,
        log_every=1,
        eval_every=2,
        eval_batches=1,
        checkpoint_every=2,
    )
    return small_run(text_folder, run, **fields | changes)


@pytest.fixture(scope="module")
def whole(text_folder, tmp_path_factory):
    """An uninterrupted run of 6 steps that keeps all its checkpoints."""
    cfg = config(text_folder, tmp_path_factory.mktemp("whole") / "run", keep=9)
    train(cfg)
    return cfg


def losses(run) -> dict[int, float]:
    lines = map(json.loads, (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_processes_share_the_files_and_leave_out_each_others_lists_half_written_too(tmp_path):
    for i in range(5):
        (tmp_path / f"array-{i}").write_text(str(i))
    (tmp_path / "checksums-0-of-2.jsonabc.tmp").write_text(
        "{"
    )  # process 0 is writing while process 1 lists the files
    write_sums(tmp_path, 1, 2)
    (tmp_path / "checksums-0-of-2.jsonabc.tmp").unlink()
    write_sums(tmp_path, 0, 2)
    assert damage(tmp_path) is None
    noted = [
        set(json.loads((tmp_path / f"checksums-{turn}-of-2.json").read_text())) for turn in range(2)
    ]
    assert not noted[0] & noted[1] and noted[0] | noted[1] == {f"array-{i}" for i in range(5)}


def same_weights(a, b):
    for x, y in zip(
        jax.tree.leaves(v4jax.load(a)[1]), jax.tree.leaves(v4jax.load(b)[1]), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def copy_of(whole, tmp_path):
    subprocess.run(["cp", "-r", whole.run_dir, tmp_path / "run"], check=True)
    return dataclasses.replace(whole, run_dir=str(tmp_path / "run"))


def flip(path: pathlib.Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


HARMS = {
    "a flipped bit": (flip, "holds other bytes than were written"),
    "a file cut short": (
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "bytes; [0-9]* were written",
    ),
    "a file gone": (lambda path: path.unlink(), "is missing"),
}


def largest(step_dir: pathlib.Path, item: str) -> pathlib.Path:
    return max(
        (path for path in (step_dir / item).rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )


@pytest.mark.parametrize(
    ("harm", "item"),
    [
        ("a flipped bit", "params"),
        ("a file gone", "optimizer"),
        pytest.param("a flipped bit", "optimizer", marks=pytest.mark.long),
        pytest.param("a file cut short", "params", marks=pytest.mark.slow),
        pytest.param("a file cut short", "optimizer", marks=pytest.mark.long),
        pytest.param("a file gone", "params", marks=pytest.mark.long),
    ],
)
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_used(
    whole, tmp_path, caplog, harm, item
):
    cfg = copy_of(whole, tmp_path)
    run = pathlib.Path(cfg.run_dir)
    action, words = HARMS[harm]
    action(largest(run / "checkpoints" / "6", item))
    before = damage(run / "checkpoints" / "6")
    assert before is not None
    with pytest.raises(ValueError, match=f"checkpoints/6 is damaged: {item}/.*{words}"):
        train(dataclasses.replace(cfg, strict=True))
    train(cfg)
    assert f"{run}/checkpoints/6 is damaged" in caplog.text
    (aside,) = (run / "damaged").iterdir()
    assert aside.name.startswith("6-") and damage(aside) == before
    same_weights(cfg.run_dir, whole.run_dir)
    assert losses(cfg.run_dir) == losses(whole.run_dir)


def test_a_checkpoint_that_nothing_proves_is_used_only_where_there_is_no_other(
    whole, tmp_path, caplog
):
    """The process was killed between Orbax's last rename and the checksums."""
    cfg = copy_of(whole, tmp_path)
    checkpoints = pathlib.Path(cfg.run_dir) / "checkpoints"
    (checkpoints / "6" / "checksums.json").unlink()
    with pytest.raises(
        ValueError,
        match="checkpoints/6 is damaged: it has no checksums, so nothing proves it whole",
    ):
        train(dataclasses.replace(cfg, strict=True))
    with Store(cfg.run_dir) as store:
        assert store.latest == 6 and store.latest_intact() == 4
        for step in (2, 4):
            (checkpoints / str(step) / "checksums.json").unlink()
        caplog.clear()
        assert store.latest_intact() == 6
        assert "checkpoints/6 is used all the same, as there is no better one" in caplog.text
        (checkpoints / "6" / "checksums.json").write_text("[]")
        assert store.latest_intact() == 4
    train(cfg)
    same_weights(cfg.run_dir, whole.run_dir)
    assert [
        path.name.split("-")[0] for path in (pathlib.Path(cfg.run_dir) / "damaged").iterdir()
    ] == ["6"]


def test_weights_are_read_from_the_newest_intact_checkpoint(whole, tmp_path, caplog):
    cfg = copy_of(whole, tmp_path)
    run = pathlib.Path(cfg.run_dir)
    flip(largest(run / "checkpoints" / "6", "optimizer"))
    same_weights(cfg.run_dir, whole.run_dir)  # the weights themselves are sound
    flip(largest(run / "checkpoints" / "6", "params"))
    _, params = v4jax.load(run)
    assert f"{run}/checkpoints/6 is damaged" in caplog.text
    (run / "checkpoints" / "6").rename(run / "six")
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(v4jax.load(run)[1]), strict=True):
        np.testing.assert_array_equal(x, y)
    for step in (2, 4):
        flip(largest(run / "checkpoints" / str(step), "params"))
    assert cli.main(["convert", str(run), str(tmp_path / "out")]) == 2
    with pytest.raises(ValueError, match="checkpoints/2 is damaged"):
        v4jax.load(run)


def test_what_is_kept(whole, tmp_path):
    cfg = dataclasses.replace(
        whole,
        run_dir=str(tmp_path / "run"),
        keep=1,
        keep_every=4,
        keep_best=1,
        checkpoint_every=1,
        eval_every=1,
    )
    train(cfg)
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    held_out = {line["step"]: line["held_out_nll"] for line in lines if "held_out_nll" in line}
    best = min(held_out, key=held_out.get)
    with Store(tmp_path / "run") as store:
        kept = {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()}
        assert store.latest == 6
    assert kept == {4, 6, best}


def test_a_run_that_goes_on_finishes_a_deletion_though_it_saves_no_more(whole, tmp_path):
    """Its process was killed while it deleted the older checkpoints, after the last save."""
    cfg = dataclasses.replace(copy_of(whole, tmp_path), keep=1)
    checkpoints = pathlib.Path(cfg.run_dir) / "checkpoints"
    largest(checkpoints / "2", "params").unlink()
    train(cfg)
    assert [path.name for path in checkpoints.iterdir()] == ["6"]
    same_weights(cfg.run_dir, whole.run_dir)


FULL_DISK = """
import resource, signal
from test_intact import config
from v4jax.checkpoint.store import Store
from v4jax.train.loop import train

save = Store.save
def save_with_little_room(store, step, items, loss):
    if step == 4:
        store._checkpointer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    save(store, step, items, loss)

Store.save = save_with_little_room
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
train(config({text!r}, {run!r}, keep=9))
"""


def test_a_full_disk_is_an_error_and_the_checkpoints_before_it_stay(whole, text_folder, tmp_path):
    """Saves in a process of its own, since Orbax leaves threads and tasks of a failed save behind.

    Their complaints would meet other tests.
    """
    cfg = dataclasses.replace(whole, run_dir=str(tmp_path / "run"))
    script = tmp_path / "full_disk.py"
    script.write_text(FULL_DISK.format(text=str(text_folder), run=cfg.run_dir))
    here = pathlib.Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parent}:{here}", "JAX_NUM_CPU_DEVICES": "8"}
    environment |= programs_compiled_here()
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "OSError: a checkpoint could not be written" in done.stderr, (
        done.stderr[-2000:]
    )
    assert "those before it are intact" in done.stderr
    with Store(cfg.run_dir) as store:
        assert store.latest_intact(strict=True) == 2
    train(cfg)
    same_weights(cfg.run_dir, whole.run_dir)
    assert losses(cfg.run_dir) == losses(whole.run_dir)


def test_what_stands_beside_the_weights_goes_along(text_folder, tmp_path):
    """A release is trained and exported with its config.json, but for the precision.

    So is generation_config.json.
    """
    source = tmp_path / "source"
    v4jax.save_safetensors(MODEL, random_params(MODEL), source, dtype="official")
    raw = json.loads((source / "config.json").read_text()) | {
        "note": "kept",
        "auto_map": {"AutoConfig": "x.Y"},
    }
    assert "quantization_config" in raw
    (source / "config.json").write_text(json.dumps(raw))
    (source / "generation_config.json").write_text('{"temperature": 0.7}')
    (source / "pytorch_model.bin").write_bytes(b"stays")
    for export, dropped in (
        ("bfloat16", {"quantization_config", "expert_dtype"}),
        ("official", set()),
    ):
        run = tmp_path / export
        train(config(text_folder, run, steps=1, init_from=str(source), export=export))
        got = json.loads((run / "export" / "config.json").read_text())
        assert got == {name: value for name, value in raw.items() if name not in dropped}
        names = {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert {path.name for path in (run / "export").iterdir()} == names
        assert (run / "export" / "generation_config.json").read_text() == '{"temperature": 0.7}'


@pytest.mark.slow
def test_a_run_may_start_from_any_checkpoint(whole, text_folder, tmp_path):
    v4jax.save_safetensors(*v4jax.load(whole.run_dir), tmp_path / "official", dtype="official")
    fresh = config(text_folder, tmp_path / "fresh", steps=1)
    train(fresh)
    for source in (whole.run_dir, str(tmp_path / "official")):
        cfg = config(
            text_folder,
            tmp_path / f"from-{pathlib.Path(source).name}",
            init_from=source,
            steps=1,
            learning_rate=1e-12,
        )
        train(cfg)
        _, started = v4jax.load(source)
        _, got = v4jax.load(cfg.run_dir)
        for (path, x), y in zip(
            jax.tree_util.tree_leaves_with_path(started), jax.tree.leaves(got), strict=True
        ):
            bound = 1e-3 if path[0].key == "router" else 1e-6  # one step moves the bias by its rate
            np.testing.assert_allclose(x, y, atol=1.01 * bound, err_msg=jax.tree_util.keystr(path))
        assert losses(cfg.run_dir)[1] < losses(fresh.run_dir)[1]


CONFIG = """
from test_intact import config
def get_config():
    plan = dict(steps=100000, checkpoint_every=50000, eval_batches=0, log_every=1)
    return config({text!r}, {run!r}, **plan, mesh={mesh!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_sigterm_saves_and_the_run_goes_on(text_folder, tmp_path, processes):
    file = tmp_path / "cfg.py"
    run = tmp_path / "run"
    file.write_text(
        CONFIG.format(text=str(text_folder), run=str(run), mesh="data=2" if processes == 2 else "")
    )
    command = [sys.executable, "-m", "v4jax", "train", str(file)]
    if processes == 2:
        command = [
            sys.executable,
            "-m",
            "v4jax",
            "launch",
            "--processes",
            "2",
            "--devices",
            "1",
            "--",
            *command,
        ]
    environment = os.environ | {
        "PYTHONPATH": str(pathlib.Path(__file__).parent),
        "JAX_PLATFORMS": "cpu",
    }

    def start(*more):
        return subprocess.Popen(
            [*command, *more],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    job, deadline = start(), time.time() + 240
    while (
        time.time() < deadline
        and job.poll() is None
        and len(losses(run) if (run / "metrics.jsonl").exists() else ()) < 3
    ):
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=200)
    assert job.returncode == 0, err[-2000:]
    with Store(run) as store:
        stopped = store.latest_intact(strict=True)
    assert stopped == max(losses(run)) >= 3 and f"stopped_at: {stopped}" in out
    job = start("--steps", str(stopped + 2))
    out, err = job.communicate(timeout=240)
    assert job.returncode == 0, err[-2000:]
    assert max(losses(run)) == stopped + 2 and sorted(losses(run)) == list(range(1, stopped + 3))
