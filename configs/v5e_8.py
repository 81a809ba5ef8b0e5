"""A small V4 from random weights on a v5e-8: 1.7B parameters, 0.33B active, 26B tokens.

Attention is dense for most of the run; then the indexer learns alone, then attention is sparse, the
order of the report. Sizes, rates and lengths are ours, and no run has tested them.

Command: v4jax train configs/v5e_8.py --data.source TEXT --data.tokenizer FOLDER
    TEXT is a file of JSON lines, {"text": ...} in each, or a folder of such files. FOLDER has a
    tokenizer.json; that of a DeepSeek-V4 release has the model's vocabulary.
Plan first: v4jax train configs/v5e_8.py --dry-run --target v5e:2x4
Hardware: the 8 chips of a v5e-8. Mesh and micro-batches are within 2% of the fastest of
    `v4jax layout configs/v5e_8.py --search --remat layer --target v5e:2x4`, which libtpu 0.0.42
    cannot compile. Nobody has run it: compiled ahead of time, the first stage takes 10.0 GB of a
    chip's 16 (benchmarks/README.md).
Time: 3.5 s a step, two days in all, estimated.
Next file to read: configs/models.py.
"""

from configs import models
from v4jax.data.config import DataConfig
from v4jax.train.config import TrainConfig
from v4jax.train.stages import Stage


def get_config() -> TrainConfig:
    """0.5M tokens a step in 4 micro-batches; attention is dense for nine tenths of the run."""
    return TrainConfig(
        model=models.small(),
        data=DataConfig(source="text", format="jsonl", tokenizer="tokenizer.json"),
        run_dir="runs/v5e_8",
        mesh="fsdp=4,expert=2",
        layout="full",
        steps=50_000,
        batch_size=128,
        gradient_accumulation=4,
        seq_len=4096,
        dtype="bfloat16",
        attention="dense",
        learning_rate=1e-3,
        index_learning_rate=1e-3,
        warmup_steps=1000,
        decay_steps=5000,
        eval_every=1000,
        checkpoint_every=1000,
        stages=(Stage(after=44_000, attention="indexer"), Stage(after=45_000, attention="sparse")),
    )
