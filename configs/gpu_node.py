"""A V4 of 4.5B parameters, 0.78B active, from random weights on a node of 8 H100s: 105B tokens.

Attention is dense for most of the run; then the indexer learns alone, then attention is sparse, the
order of the report. Sizes, rates and lengths are ours, and no run has tested them.

Command: v4jax train configs/gpu_node.py --data.source TEXT --data.tokenizer FOLDER
    TEXT is a file of JSON lines, {"text": ...} in each, or a folder of such files. FOLDER has a
    tokenizer.json; that of a DeepSeek-V4 release has the model's vocabulary.
Plan first: v4jax train configs/gpu_node.py --dry-run --target h100:8
Hardware: 8 H100s or H200s of one node. Mesh and micro-batches are the fastest of
    `v4jax layout configs/gpu_node.py --search --remat layer --target h100:8`. Nobody has run it:
    compiled ahead of time, the first stage takes 48 GB of an H100's 80
    (benchmarks/README.md), of which JAX takes 60 unless told otherwise.
Time: 3.2 s a step, three and a half days in all, estimated.
Next file to read: configs/models.py.
"""

from configs import models
from v4jax.data.config import DataConfig
from v4jax.train.config import TrainConfig
from v4jax.train.stages import Stage


def get_config() -> TrainConfig:
    """1M tokens a step in 2 micro-batches; attention is dense for nine tenths of the run."""
    return TrainConfig(
        model=models.medium(),
        data=DataConfig(source="text", format="jsonl", tokenizer="tokenizer.json"),
        run_dir="runs/gpu_node",
        mesh="fsdp=8",
        layout="fsdp",
        steps=100_000,
        batch_size=256,
        gradient_accumulation=2,
        seq_len=4096,
        dtype="bfloat16",
        attention="dense",
        learning_rate=6e-4,
        index_learning_rate=6e-4,
        warmup_steps=2000,
        decay_steps=10_000,
        eval_every=1000,
        checkpoint_every=1000,
        stages=(Stage(after=88_000, attention="indexer"), Stage(after=90_000, attention="sparse")),
    )
