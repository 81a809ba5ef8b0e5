"""Adapters on the released V4-Pro on two nodes of 8 H200s: rank 16 on every matrix, conversations.

The base stays as released, fp8 and MXFP4, and is read matrix by matrix. Rows are 4K tokens, 131K
tokens a step; only what the assistant says is learned. Rate and length are ours, and no run has
tested them.

Command: on every host, v4jax train configs/pro_lora.py --init-from DeepSeek-V4-Pro
        --data.source CHATS.jsonl --data.tokenizer DeepSeek-V4-Pro
    DeepSeek-V4-Pro is the folder of the release, a bucket, or deepseek-ai/DeepSeek-V4-Pro.
    CHATS.jsonl has a conversation a line (docs/data.md).
Plan first: v4jax train configs/pro_lora.py --dry-run --target h200:16
Hardware: 16 H200s. On 32 v5p chips (v5p-64): --mesh data=4,fsdp=8 --gradient-accumulation 1.
    Nobody has run it; compiled, a device takes 107 GB on H200s and 67 on v5p (docs/lora.md).
Next file to read: v4jax/adapters/config.py.
"""

from configs import models
from sharding.rules import layout
from v4jax.adapters.config import Lora
from v4jax.data.config import ChatFormat, DataConfig
from v4jax.train.config import TrainConfig

NODES = layout(
    act_batch="data fsdp",
    # Each expert is on one device, whole, and rows travel to it.
    experts="data fsdp",
    exchange=True,
    # All else is cut within a node. Among more than 8 devices, 128 x 128 blocks would be cut too.
    embed="fsdp",
    streams_embed="fsdp",
    group_in="fsdp",
)


def get_config() -> TrainConfig:
    """1,000 steps of 32 rows of 4,096 tokens, in 2 micro-batches."""
    return TrainConfig(
        model=models.pro(),
        init_from="./checkpoints/DeepSeek-V4-Pro",
        lora=Lora(rank=16, alpha=32, base_dtype="packed"),
        data=DataConfig(
            source="chats.jsonl",
            format="chat",
            column="messages",
            tokenizer="./checkpoints/DeepSeek-V4-Pro",
            packing="best_fit",
            chat=ChatFormat(too_long="drop"),
        ),
        run_dir="runs/pro_lora",
        mesh="data=2,fsdp=8",
        layout=NODES,
        dtype="bfloat16",
        steps=1000,
        batch_size=32,
        gradient_accumulation=2,
        seq_len=4096,
        learning_rate=1e-4,
        warmup_steps=30,
        decay_steps=970,
        eval_every=100,
        checkpoint_every=200,
    )
