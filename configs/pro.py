"""V4-Pro, pre-training on 512 v5p chips with the report's numbers and the order of its stages.

The numbers are those of docs/equations.md#sizes and docs/equations.md#schedule: 94.4M tokens a
step, attention dense for the first 1T tokens, rows of 4K, 16K, then 64K tokens, a stage in which
only the indexer learns, then sparse attention. How long the report's stages last is unpublished;
the steps at which the lengths change here, and the 1,000 steps of the indexer's stage, are ours. A
last stage at 1M tokens needs another mesh.

Command: v4jax train configs/pro.py
Plan first: v4jax train configs/pro.py --dry-run --target v5p:8x8x8
Hardware: a slice of 512 v5p chips (v5p:8x8x8). Nobody has run it: the first stage, compiled ahead
of time, takes 73 GB of a chip's 102 (benchmarks/README.md); times are estimates. On other chips,
take mesh and micro-batches from `v4jax layout configs/pro.py --search --target ...`.
Next file to read: configs/models.py.
"""

from configs import models
from v4jax.train.config import TrainConfig
from v4jax.train.stages import Stage


def get_config() -> TrainConfig:
    """The report's schedule and stages, 45 micro-batches a step."""
    return TrainConfig(
        model=models.pro(),
        run_dir="runs/pro",
        mesh="context=16,expert=32",
        layout="pod",
        steps=350_000,
        batch_size=23_040,
        gradient_accumulation=45,
        seq_len=4096,
        dtype="bfloat16",
        attention="dense",
        learning_rate=2.0e-4,
        index_learning_rate=2.0e-4,
        warmup_steps=2000,
        decay_steps=35_000,
        stages=(
            Stage(after=5_000, batch_size=5760, seq_len=16_384),
            Stage(after=8_000, batch_size=1440, seq_len=65_536),
            Stage(after=10_600, attention="indexer"),  # 1T tokens
            Stage(after=11_600, attention="sparse"),
        ),
    )
