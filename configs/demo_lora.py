"""Adapters on the demo's own release: rank 8 on every matrix of its packed fp8 and MXFP4 weights.

The task is made up: Python functions whose names say what they return, in demo_lora.jsonl.

Command: make demo-lora
    It comes after make demo, whose export it converts to runs/demo-official.
Hardware: 2 CPU cores; 8 simulated devices as data=2, expert=4.
Time: 2 minutes on two free cores, after the demo.
Expected result: the loss falls from 2.6 to 0.4 within the 60 steps, to 0.29 held out. The pairs
    have an eighth as many numbers as the model; checkpoints hold nothing else of the weights.
Next file to read: v4jax/adapters/config.py.
"""

import pathlib

from configs.demo import get_model
from v4jax.adapters.config import Lora
from v4jax.data.config import DataConfig
from v4jax.train.config import TrainConfig


def get_config() -> TrainConfig:
    """60 steps of 8 rows of 256 bytes."""
    return TrainConfig(
        model=get_model(),
        init_from="runs/demo-official",
        lora=Lora(rank=8, alpha=16, base_dtype="packed"),
        data=DataConfig(
            source=str(pathlib.Path(__file__).with_name("demo_lora.jsonl")),
            format="jsonl",
            tokenizer="byte",
            held_out=0.1,
        ),
        run_dir="runs/demo-lora",
        mesh="data=2,expert=4",
        steps=60,
        batch_size=8,
        seq_len=256,
        learning_rate=1e-2,
        warmup_steps=5,
        decay_steps=30,
        log_every=5,
        eval_every=20,
        eval_batches=4,
        checkpoint_every=60,
        remat="none",
    )
