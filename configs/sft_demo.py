"""Fine-tunes the demo's model on conversations: the 160 short ones of configs/sft_demo.jsonl.

Command: JAX_PLATFORMS=cpu v4jax train configs/sft_demo.py --init-from runs/demo
    It comes after make demo. Without --init-from it starts from fresh weights.
Hardware: 2 CPU cores; 8 simulated devices as data=2, expert=2, tensor=2.
Expected result: the loss of what the assistant says falls from 4.5 to 0.1 within the 60 steps, and
    is 0.29 held out. The sample answers "odd" or "even", not always correctly.
Next file to read: v4jax/data/conversations.py.
"""

import pathlib

from configs.demo import get_model
from v4jax.data.config import ChatFormat, DataConfig
from v4jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    """60 steps of 8 rows of 256 bytes, in which the bias of the router does not move."""
    return TrainConfig(
        model=get_model(),
        data=DataConfig(
            source=str(pathlib.Path(__file__).with_name("sft_demo.jsonl")),
            format="chat",
            column="messages",
            tokenizer="byte-chat",
            held_out=0.1,
            packing="best_fit",
            chat=ChatFormat(thinking_mode="thinking", drop_thinking=True),
        ),
        run_dir="runs/sft_demo",
        mesh="data=2,expert=2,tensor=2",
        steps=60,
        batch_size=8,
        seq_len=256,
        learning_rate=2e-3,
        warmup_steps=5,
        decay_steps=30,
        log_every=5,
        eval_every=20,
        eval_batches=4,
        checkpoint_every=60,
        remat="none",
        sample_prompt="<｜User｜>Is 351 odd or even?<｜Assistant｜><think>",
        sample_tokens=60,
    )
