"""V4-Flash, pre-training on 128 v5p chips with the report's numbers and the order of its stages.

The numbers are those of docs/equations.md#sizes and docs/equations.md#schedule: 75.5M tokens a
step, attention dense for the first 1T tokens, rows of 4K, 16K, then 64K tokens, a stage in which
only the indexer learns, then sparse attention. How long the report's stages last is unpublished;
the steps at which the lengths change here, and the 1,000 steps of the indexer's stage, are ours. A
last stage at 1M tokens needs another mesh (context=64,tensor=2 has the memory on 128 chips).

Command: v4jax train configs/flash.py
Plan first: v4jax train configs/flash.py --dry-run --target v5p:4x4x8
Hardware: a slice of 128 v5p chips (v5p:4x4x8). Nobody has run it: the first stage, compiled ahead
of time, takes 58 GB of a chip's 102 (benchmarks/README.md); times are estimates. On other chips,
take mesh and micro-batches from `v4jax layout configs/flash.py --search --target ...`.
Next file to read: configs/models.py.
"""

from configs import models
from v4jax.train.config import TrainConfig
from v4jax.train.stages import Stage


def get_config() -> TrainConfig:
    """The report's schedule and stages, 48 micro-batches a step, 72 for long rows."""
    return TrainConfig(
        model=models.flash(),
        run_dir="runs/flash",
        mesh="context=8,expert=16",
        layout="pod",
        steps=420_000,
        batch_size=18_432,
        gradient_accumulation=48,
        seq_len=4096,
        dtype="bfloat16",
        attention="dense",
        learning_rate=2.7e-4,
        index_learning_rate=2.7e-4,
        warmup_steps=2000,
        decay_steps=40_000,
        stages=(
            Stage(after=6_000, batch_size=4608, seq_len=16_384),
            Stage(after=10_000, batch_size=1152, gradient_accumulation=72, seq_len=65_536),
            Stage(after=13_250, attention="indexer"),  # 1T tokens
            Stage(after=14_250, attention="sparse"),
        ),
    )
