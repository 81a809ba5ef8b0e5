"""Adapters on the released V4-Flash on a node of 8 H100s: rank 16 on every matrix, conversations.

The base stays as released, fp8 and MXFP4, and is read layer by layer. Rows are 4K tokens, 131K
tokens a step; only what the assistant says is learned. Rate and length are ours, and no run has
tested them.

Command: v4jax train configs/flash_lora.py --init-from DeepSeek-V4-Flash --data.source CHATS.jsonl
        --data.tokenizer DeepSeek-V4-Flash
    DeepSeek-V4-Flash is the folder of the release, a bucket, or deepseek-ai/DeepSeek-V4-Flash.
    CHATS.jsonl has a conversation a line (docs/data.md).
Plan first: v4jax train configs/flash_lora.py --dry-run --target h100:8
Hardware: 8 H100s of 80 GB or 8 H200s. On 8 v5p chips (v5p-16): --mesh fsdp=2,expert=4. On 32 v6e:
    --mesh context=2,expert=8,tensor=2 --layout full. Nobody has run it; compiled, a device takes
    44 GB on H100s, 46 on v5p and 23 on v6e (docs/lora.md).
Time: 4.2 s a step on H100s, 70 minutes in all, estimated.
Next file to read: v4jax/adapters/config.py.
"""

from configs import models
from v4jax.adapters.config import Lora
from v4jax.data.config import ChatFormat, DataConfig
from v4jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    """1,000 steps of 32 rows of 4,096 tokens, in 4 micro-batches."""
    return TrainConfig(
        model=models.flash(),
        init_from="./checkpoints/DeepSeek-V4-Flash",
        lora=Lora(rank=16, alpha=32, base_dtype="packed"),
        data=DataConfig(
            source="chats.jsonl",
            format="chat",
            column="messages",
            tokenizer="./checkpoints/DeepSeek-V4-Flash",
            packing="best_fit",
            chat=ChatFormat(too_long="drop"),
        ),
        run_dir="runs/flash_lora",
        mesh="expert=8",
        layout="pod",
        dtype="bfloat16",
        steps=1000,
        batch_size=32,
        gradient_accumulation=4,
        seq_len=4096,
        learning_rate=1e-4,
        warmup_steps=30,
        decay_steps=970,
        eval_every=100,
        checkpoint_every=200,
    )
