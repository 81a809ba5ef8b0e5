"""V4-Flash, pre-training at sequence length 4096 with the report's numbers.

The numbers are those of docs/equations.md#sizes and docs/equations.md#schedule. The report grows
the batch from a small one to the size below, and the sequence from 4K to 1M. How long those stages
last is unpublished; add them as `stages` (v4jax/train/stages.py).

Command: v4jax train configs/flash.py --mesh fsdp=...,expert=...; v4jax cost configs/flash.py
Hardware: a TPU pod. Nobody has run it; `v4jax cost` and the tests read it.
Next file to read: configs/models.py.
"""

from configs import models
from v4jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    """The report's schedule at one batch size and length."""
    return TrainConfig(
        model=models.flash(),
        run_dir="runs/flash",
        steps=420_000,
        batch_size=18_432,
        seq_len=4096,
        dtype="bfloat16",
        learning_rate=2.7e-4,
        warmup_steps=2000,
        decay_steps=40_000,
    )
