"""A run whose optimizer state is bfloat16 resumes bit for bit, and only with that state."""

import dataclasses

import jax
import numpy as np
import pytest
from test_run import MODEL

import v4jax
from v4jax.data.config import DataConfig
from v4jax.train.config import TrainConfig
from v4jax.train.loop import train


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """A run of 2 steps that will be 4, in micro-batches and with every layer recomputed."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"document {i}: " + "the cat sat on the mat. " * 20)
    return TrainConfig(
        model=MODEL,
        data=DataConfig(source=str(folder), held_out=0.2),
        run_dir=str(tmp_path_factory.mktemp("run") / "run"),
        steps=4,
        batch_size=4,
        gradient_accumulation=2,
        seq_len=48,
        learning_rate=5e-3,
        warmup_steps=0,
        eval_batches=0,
        checkpoint_every=2,
        momentum_dtype="bfloat16",
        moment_dtype="bfloat16",
        newton_schulz_dtype="bfloat16",
        remat="dots",
        export="none",
    )


def test_a_checkpoint_of_another_dtype_is_refused(cfg):
    train(dataclasses.replace(cfg, steps=2))
    for field in ("momentum_dtype", "moment_dtype"):
        wrong = dataclasses.replace(cfg, **{field: "float32"})
        with pytest.raises(ValueError, match=f"{field}: got float32; .* has bfloat16: resume with"):
            train(wrong)


@pytest.mark.slow
def test_it_resumes_bit_for_bit(cfg, tmp_path):
    train(dataclasses.replace(cfg, steps=2))
    train(cfg)
    whole = dataclasses.replace(cfg, run_dir=str(tmp_path / "run"))
    train(whole)
    for a, b in zip(
        jax.tree.leaves(v4jax.load(cfg.run_dir)[1]),
        jax.tree.leaves(v4jax.load(whole.run_dir)[1]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
