"""V4-Pro, pre-training at sequence length 4096 with the report's numbers.

They are those of docs/equations.md#sizes and docs/equations.md#schedule.

Command: v4jax train configs/pro.py --mesh fsdp=...,expert=...; v4jax cost configs/pro.py
Hardware: a TPU pod. Nobody has run it; `v4jax cost` and the tests read it. The report's batch grows to the size below from a
small one and its sequence from 4K to 1M; how long those stages last is unpublished: add them as `stages` (v4jax/train/stages.py).
Next file to read: configs/models.py.
"""

from configs import models
from v4jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    """The report's schedule at one batch size and length."""
    return TrainConfig(
        model=models.pro(),
        run_dir="runs/pro",
        steps=350_000,
        batch_size=23_040,
        seq_len=4096,
        dtype="bfloat16",
        learning_rate=2.0e-4,
        warmup_steps=2000,
        decay_steps=35_000,
    )
