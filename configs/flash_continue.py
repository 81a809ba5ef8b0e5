"""Continues the pre-training of V4-Flash from its released base weights, on 64 v5p chips.

All weights learn, on rows of 16K tokens, 1M tokens a step, 5.2B in all. The peak of the learning
rate is the one that pre-training ends with; lengths and rates are ours, and no run has tested them.

Command: v4jax convert DeepSeek-V4-Flash-Base checkpoints/flash-base --format orbax
    v4jax train configs/flash_continue.py --data.source TEXT
    The store lies where every host sees it; each host reads only its own parts of it. Elsewhere
    than in checkpoints/flash-base: --init-from STORE --data.tokenizer STORE. TEXT is a file of JSON
    lines, {"text": ...} in each, or a folder of such files.
Plan first: v4jax train configs/flash_continue.py --dry-run --target v5p:4x4x4
Hardware: 64 v5p chips (v5p:4x4x4), the fewest that fit: float32 weights, bfloat16 momentum, one
    micro-batch. The mesh is the fastest of `v4jax layout configs/flash_continue.py --search
    --remat layer --target v5p:4x4x4`. Nobody has run it; 80 GB of a chip's 102 is an estimate.
Time: 9.4 s a step, 13 hours in all, estimated.
Next file to read: configs/from_flash.py.
"""

from configs.from_flash import from_flash
from v4jax.data.config import DataConfig
from v4jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    """5,000 steps of 64 rows of 16,384 tokens, at the rate at which pre-training ended."""
    return from_flash(
        "./checkpoints/flash-base",
        learning_rate=2.7e-5,
        data=DataConfig(source="text", format="jsonl", tokenizer="./checkpoints/flash-base"),
        run_dir="runs/flash_continue",
        mesh="expert=64",
        steps=5000,
        batch_size=64,
        seq_len=16_384,
        warmup_steps=200,
        decay_steps=4800,
        eval_every=250,
        checkpoint_every=250,
    )
