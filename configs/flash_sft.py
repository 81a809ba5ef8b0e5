"""Fine-tunes all weights of the released V4-Flash on conversations, on 32 H200s.

Whole conversations are packed into rows of 8K tokens, 131K tokens a step; only what the assistant
says is learned, and the router's bias stays. Longer conversations are left out and counted
(--data.chat.too-long cut or error). Lengths and rates are ours, and no run has tested them.

Command: v4jax convert DeepSeek-V4-Flash checkpoints/flash --format orbax
    v4jax train configs/flash_sft.py --data.source CHATS.jsonl
    The store lies where every host sees it; each host reads only its own parts of it. Elsewhere
    than in checkpoints/flash: --init-from STORE --data.tokenizer STORE. CHATS.jsonl has a
    conversation a line (docs/data.md).
Plan first: v4jax train configs/flash_sft.py --dry-run --target h200:32
Hardware: 4 nodes of 8 H200s, the fewest that fit: float32 weights, bfloat16 momentum, one
    micro-batch. Mesh: the fastest of `v4jax layout configs/flash_sft.py --search --remat
    layer --target h200:32`, 113 GB of 141, estimated; nobody has run it, and the estimate of
    configs/gpu_node.py is 6% too low. JAX takes 75% of a GPU's memory unless
    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 is set. On 64 v5p chips (57 GB of 102, 3.8 s a step):
    --mesh context=2,expert=32 --batch-size 32.
Time: 5.2 s a step, 87 minutes in all, estimated.
Next file to read: configs/from_flash.py.
"""

from configs.from_flash import from_flash
from v4jax.data.config import ChatFormat, DataConfig
from v4jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    """1,000 steps of 16 rows of 8,192 tokens; only what the assistant says is learned."""
    return from_flash(
        "./checkpoints/flash",
        learning_rate=1e-5,
        data=DataConfig(
            source="chats.jsonl",
            format="chat",
            column="messages",
            tokenizer="./checkpoints/flash",
            packing="best_fit",
            chat=ChatFormat(too_long="drop"),
        ),
        run_dir="runs/flash_sft",
        mesh="expert=16,tensor=2",
        steps=1000,
        batch_size=16,
        seq_len=8192,
        warmup_steps=30,
        decay_steps=970,
        eval_every=100,
        checkpoint_every=200,
    )
