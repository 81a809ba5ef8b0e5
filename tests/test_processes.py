"""2 processes of 4 devices against 1 of 8, and jobs that lose a process."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import MINUTE, ROOT, environment, launched, python, run
from small_runs import write_text
from trees import random_params

import v4jax
from sharding import process_rows, processes
from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import layout_for
from v4jax.checkpoint.names import to_official
from v4jax.cli import main as cli
from v4jax.config import ModelConfig, RopeScaling
from v4jax.context import Context
from v4jax.data.config import DataConfig
from v4jax.launch import _environment, _free_port
from v4jax.train.config import TrainConfig
from v4jax.train.loop import train
from v4jax.train.loss import loss_and_routing
from v4jax.train.step import batch_sharding

MODEL = ModelConfig(
    vocab_size=264,
    hidden_size=32,
    moe_intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=8,
    head_dim=16,
    qk_rope_head_dim=8,
    q_lora_rank=16,
    o_groups=8,
    o_lora_rank=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    routed_scaling_factor=1.5,
    compress_ratios=(4, 0),
    num_hash_layers=1,
    sliding_window=8,
    index_n_heads=8,
    index_head_dim=16,
    index_topk=4,
    compress_rope_theta=160000.0,
    rope_scaling=RopeScaling(),
)
MESHES = "data=8", "data=2,expert=2,tensor=2", "tensor=8", "context=8"


# ---- one job of 2 processes x 4 devices against 8 devices here -----------------------------------


def global_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "tokens": rng.integers(0, 264, (8, 24)).astype(np.int32),
        "segment_ids": np.ones((8, 24), np.int32),
    }


def losses_and_tensors() -> dict[str, np.ndarray]:
    """The loss on each mesh and the batch on the devices, in the job or in this process."""
    found, model = {}, MODEL.replace(num_nextn_predict_layers=0, compress_ratios=(4,))
    params = jax.tree.map(
        lambda a: a if a.ndim < 2 or a.shape[-1] == 2 else a * 0.1, random_params(model)
    )
    for spec in MESHES:
        sizes = parse_mesh(spec)
        rules, mesh = layout_for("full", sizes), make_mesh(sizes)
        processes.check_whole(mesh)
        with jax.set_mesh(mesh):
            sharding = batch_sharding(rules, mesh)
            rows = process_rows.local_rows(sharding, (8, 24))
            batch = {
                name: process_rows.from_rows(sharding, value[rows], rows, 8)
                for name, value in global_batch().items()
            }
            found[f"{spec} rows of process {jax.process_index()}"] = np.array(rows)
            found[f"{spec} batch"] = process_rows.gather(batch["tokens"])
            if spec in ("tensor=8", "context=8"):  # compiling a loss takes long
                continue
            ctx = Context(rules=rules)
            loss = jax.jit(lambda p, b, ctx=ctx: loss_and_routing(model, p, b, ctx)[0])
            found[f"{spec} loss"] = np.asarray(loss(params, batch), np.float64)
    odd = np.arange(48, dtype=np.float32).reshape(2, 8, 3)
    odd[0, 0], odd[1, 5] = -0.0, np.nan
    for dtype in ("float32", "bfloat16"):
        value = odd.astype(jnp.dtype(dtype))
        mesh = make_mesh(parse_mesh("data=2,expert=4"))
        for spec in (jax.P(None, ("data", "expert")), jax.P(None, "expert"), jax.P()):
            array = jax.make_array_from_callback(
                value.shape, jax.NamedSharding(mesh, spec), value.__getitem__
            )
            for index in ((), (1,), (1, 5), (0, 0)):
                got = process_rows.gather(array, index)
                assert got.dtype == value.dtype and got.tobytes() == value[index].tobytes(), (
                    spec,
                    index,
                )
    return found


WORKER = """
    import sys, numpy, jax
    from sharding.agreement import wait_for_all
    from sharding.processes import is_first, start
    start()
    import test_processes
    assert jax.process_count() == 2 and jax.local_device_count() == 4
    numpy.savez(f"{sys.argv[1]}_{jax.process_index()}.npz", **test_processes.losses_and_tensors())
    wait_for_all("done")
    print("stdout is clean")
"""


def test_two_processes_hold_the_rows_and_compute_the_losses_of_one(tmp_path):
    job = subprocess.Popen(
        [*launched(WORKER, output="first"), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )
    try:
        expected = losses_and_tensors()
        out, _ = job.communicate(timeout=3 * MINUTE)
    finally:
        job.kill()
    assert job.returncode == 0 and out == "stdout is clean\n", out
    for i in (0, 1):
        with np.load(tmp_path / f"out_{i}.npz") as found:
            for spec in MESHES:
                np.testing.assert_array_equal(found[f"{spec} batch"], global_batch()["tokens"])
            for name in ("data=8 loss", "data=2,expert=2,tensor=2 loss"):
                np.testing.assert_allclose(found[name], expected["data=8 loss"], rtol=1e-6)
                np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)
            rows = [found[f"{spec} rows of process {i}"].tolist() for spec in MESHES]
        assert rows == [[4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3]] * 2 + [list(range(8))] * 2


# ---- whole runs ----------------------------------------------------------------------------------


CONFIG = """
from test_processes import train_config
def get_config():
    return train_config({text!r}, {run!r})
"""


def train_config(text: str, run: str) -> TrainConfig:
    model = MODEL.replace(num_nextn_predict_layers=0, compress_ratios=(0,), num_hash_layers=0)
    return TrainConfig(
        model=model,
        data=DataConfig(source=text, held_out=0.2),
        run_dir=run,
        steps=12,
        batch_size=8,
        seq_len=16,
        mesh="data=2,expert=2,tensor=2",
        learning_rate=1e-3,
        warmup_steps=1,
        log_every=1,
        eval_every=6,
        eval_batches=3,
        checkpoint_every=4,
        remat=False,
        export="float32",
    )


def train_in_two(folder: pathlib.Path, name: str) -> list[str]:
    """The command of a run in 2 processes of 4 devices; it reads what an earlier one compiled."""
    path = folder / f"{name}.py"
    path.write_text(CONFIG.format(text=str(folder / "text"), run=str(folder / name)))
    train = [sys.executable, "-m", "v4jax", "train", str(path)]
    cache = ["env", f"JAX_COMPILATION_CACHE_DIR={folder}/cache"]
    return [
        *cache,
        sys.executable,
        "-m",
        "v4jax",
        "launch",
        "--processes",
        "2",
        "--devices",
        "4",
        "--",
        *train,
    ]


@pytest.mark.slow
def test_a_job_that_loses_a_process_ends_and_one_process_goes_on_as_if_nothing_had_happened(
    tmp_path,
):
    write_text(tmp_path / "text", repeats=9)
    lost, killed = None, None
    with subprocess.Popen(
        train_in_two(tmp_path, "run"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    ) as job:
        for line in job.stdout:
            if found := re.match(r"\[1\] is process (\d+)", line):
                lost = int(found[1])
            if "step 5/" in line:
                os.kill(lost, signal.SIGKILL)
                killed = time.monotonic()
    assert job.returncode == 137 and time.monotonic() - killed < MINUTE
    kept = {
        int(path.name)
        for path in (tmp_path / "run" / "checkpoints").iterdir()
        if path.name.isdecimal()
    }
    assert kept and max(kept) < 12
    assert train(train_config(str(tmp_path / "text"), str(tmp_path / "run")))["steps"] == 12

    done = run(*train_in_two(tmp_path, "whole"), timeout=4 * MINUTE)
    assert done.returncode == 0, done.stderr
    assert "[0] step 12/12" in done.stdout and "[1]" not in done.stdout
    assert (tmp_path / "whole" / "loss.png").exists() and len(
        list((tmp_path / "whole" / "tensorboard").iterdir())
    ) == 1
    compare(tmp_path / "run", tmp_path / "whole")


def compare(run: pathlib.Path, whole: pathlib.Path) -> None:
    """Metrics and exported weights of two runs."""

    def metrics(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        names = "loss", "grad_norm", "held_out_nll"
        return {
            (line["step"], name): line[name] for line in lines for name in names if name in line
        }

    assert metrics(run) == pytest.approx(metrics(whole), rel=1e-5)
    cfg, params = v4jax.load(whole)
    exported = v4jax.load(whole / "export")[1]
    jax.tree.map(
        np.testing.assert_array_equal, exported, params
    )  # put together from shards of two processes
    weights, expected = to_official(cfg, v4jax.load(run / "export")[1]), to_official(cfg, exported)
    for name, value in expected.items():
        # AdamW makes full steps of gradients that are rounding noise (tests/test_mesh.py), so hc_*
        # is left out.
        if name.endswith(".weight"):
            assert np.linalg.norm(weights[name] - value) <= 1e-4 * np.linalg.norm(value), name


@pytest.mark.slow
def test_two_processes_score_and_generate_as_one(tmp_path, capsys):
    params = jax.tree.map(
        lambda a: a if a.ndim < 2 or a.shape[-1] == 2 else a * 0.1, random_params(MODEL)
    )
    v4jax.save_safetensors(MODEL, params, tmp_path / "ckpt", dtype="float32")
    np.save(tmp_path / "in.npy", global_batch()["tokens"][:3])
    score = [
        "score",
        str(tmp_path / "ckpt"),
        "--tokens",
        str(tmp_path / "in.npy"),
        "--json",
        "--out",
    ]
    generate = [
        "generate",
        str(tmp_path / "ckpt"),
        "--tokens",
        "3,5,7",
        "--max-new-tokens",
        "4",
        "--json",
    ]
    assert cli.main([*score, str(tmp_path / "one.npz")]) == 0 and cli.main(generate) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    start = [
        sys.executable,
        "-m",
        "v4jax",
        "launch",
        "--processes",
        "2",
        "--devices",
        "4",
        "--output",
        "first",
        "--",
    ]
    mesh = ["--mesh", "data=2,tensor=4"]
    done = [
        run(*start, sys.executable, "-m", "v4jax", *command, *mesh)
        for command in ([*score, str(tmp_path / "two.npz")], generate)
    ]
    assert [job.returncode for job in done] == [0, 0], [job.stderr for job in done]
    assert json.loads(done[0].stdout)["logits"] == expected[0]["logits"]
    got = json.loads(done[1].stdout)
    for one in (got, expected[1]):
        one["log_probs"] = np.array(one["log_probs"])
    np.testing.assert_allclose(
        got.pop("log_probs"), expected[1].pop("log_probs"), atol=2e-5
    )  # sums in another order
    assert got == expected[1]
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "two.npz") as two:
        for name in ("logits", "mtp_logits", "nll"):
            np.testing.assert_allclose(two[name], one[name], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.long)])
def test_without_a_launcher_the_others_notice_too(lost):
    # On a cluster too, nobody kills the rest. The coordinator's loss shows at once, another's after
    # HEARTBEAT_SECONDS.
    address = f"127.0.0.1:{_free_port()}"
    code = python("""
        import time
        from sharding.agreement import wait_for_all
        from sharding.processes import start
        start()
        wait_for_all("up")
        print("up", flush=True)
        time.sleep(200)
    """)
    places = [_environment(address, 2, i, 1) | {"PYTHONPATH": str(ROOT)} for i in (0, 1)]
    jobs = [
        subprocess.Popen(
            code, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
        )
        for env in places
    ]
    try:
        assert [job.stdout.readline() for job in jobs] == ["up\n"] * 2
        jobs[lost].kill()
        begin = time.monotonic()
        assert jobs[1 - lost].wait(MINUTE) != 0
        assert time.monotonic() - begin < (10 if lost == 0 else processes.HEARTBEAT_SECONDS + 10)
    finally:
        for job in jobs:
            job.kill()
            job.communicate()
