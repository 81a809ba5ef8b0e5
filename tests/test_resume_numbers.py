"""A run whose optimizer state is bfloat16 resumes only with that state.

That it does so bit for bit, test_survival.py shows.
"""

import dataclasses

import pytest
from small_runs import small_run, write_text

from v4jax.train.loop import train


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """A run of 2 steps that will be 4, in micro-batches and with every layer recomputed."""
    return small_run(
        write_text(tmp_path_factory.mktemp("text")),
        tmp_path_factory.mktemp("run") / "run",
        batch_size=4,
        gradient_accumulation=2,
        seq_len=48,
        warmup_steps=0,
        checkpoint_every=2,
        momentum_dtype="bfloat16",
        moment_dtype="bfloat16",
        newton_schulz_dtype="bfloat16",
        remat="dots",
    )


def test_a_checkpoint_of_another_dtype_is_refused(cfg):
    train(dataclasses.replace(cfg, steps=2))
    for field in ("momentum_dtype", "moment_dtype"):
        wrong = dataclasses.replace(cfg, **{field: "float32"})
        with pytest.raises(ValueError, match=f"{field}: got float32; .* has bfloat16: resume with"):
            train(wrong)
