"""A run goes on with the same numbers when it is resumed with another choice of what costs memory.

When weights are gathered, where optimizer state lies, what is recomputed, how many micro-batches.
"""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from small_runs import MODEL as SMALL
from small_runs import small_run, write_text

from v4jax.cli import main as cli
from v4jax.train.config import TrainConfig
from v4jax.train.loop import train

MODEL = SMALL.replace(num_nextn_predict_layers=0, compress_ratios=(0,))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 4 steps on two devices, with checkpoints of the second and the last."""
    folder = tmp_path_factory.mktemp("resumed")
    cfg = small_run(
        write_text(folder / "text"),
        folder / "whole",
        model=MODEL,
        mesh="fsdp=2",
        batch_size=4,
        gradient_accumulation=2,
        warmup_steps=0,
        checkpoint_every=2,
        log_every=1,
    )
    train(cfg)
    return cfg


def figures(cfg: TrainConfig) -> np.ndarray:
    """Loss and gradient norm of the third step and of the last [2,2]."""
    lines = (pathlib.Path(cfg.run_dir) / "metrics.jsonl").read_text().splitlines()
    found = {line["step"]: line for line in map(json.loads, lines) if "loss" in line}
    return np.array([[found[step][name] for name in ("loss", "grad_norm")] for step in (3, 4)])


@pytest.mark.slow
def test_a_run_goes_on_as_if_nothing_had_changed(whole, tmp_path):
    """Sums in another order differ in the last bits, which the update of step 3 makes larger."""
    run = tmp_path / "run"
    shutil.copytree(whole.run_dir, run)
    shutil.rmtree(run / "checkpoints" / "4")
    again = dataclasses.replace(
        whole,
        run_dir=str(run),
        gather="step",
        optimizer_memory="host",
        gradient_accumulation=1,
        remat="layer",
    )
    train(again)
    third, last = figures(again)
    np.testing.assert_allclose(third, figures(whole)[0], rtol=1e-6)
    np.testing.assert_allclose(last, figures(whole)[1], rtol=1e-4)


@pytest.mark.parametrize(
    "command, flag, value, line",
    [
        ("train", "gather", "never", "gather: got 'never'; allowed: micro_batch, step"),
        ("train", "optimizer-memory", "disk", "optimizer_memory: got 'disk'; allowed: device, h"),
        ("train", "gradient-accumulation", "3", "gradient_accumulation: got 3; must be auto, or"),
        ("train", "gradient-accumulation", "0", "gradient_accumulation: got 0; must be auto, or"),
        ("train", "gradient-accumulation", "-1", "gradient_accumulation: got -1; must be auto"),
        ("train", "gradient-accumulation", "few", "--gradient-accumulation"),
        ("train", "remat", "some", "remat: got 'some'"),
        ("layout", "gradient-accumulation", "auto", "--gradient-accumulation: invalid int value"),
        ("layout", "estimate", "guess", "--estimate: invalid choice: 'guess' (choose from"),
    ],
)
def test_an_invalid_choice_is_one_line(command, flag, value, line, capsys):
    config = str(pathlib.Path(__file__).parent.parent / "configs/demo.py")
    assert cli.main([command, config, f"--{flag}", value]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1, error
