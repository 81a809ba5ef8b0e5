"""A layout of your own: the demo with experts over 4 devices, and large matrices cut over all 8.

Command: JAX_PLATFORMS=cpu v4jax train examples/own_layout.py
Estimated: v4jax layout examples/own_layout.py --paper
With another config:
    v4jax train configs/demo.py --mesh fsdp=2,expert=4 --layout examples/own_layout.py:mine
Hardware: 2 CPU cores; 8 simulated devices as fsdp=2, expert=4.
Next file to read: docs/own-layout.md.
"""

import dataclasses

from configs.demo import get_config as demo
from sharding.rules import layout
from v4jax.train.config import TrainConfig

mine = layout(
    name="mine",
    act_batch="fsdp expert",  # each device has rows of its own
    experts="expert",  # routed experts lie on their devices, tokens go there
    expert_embed="fsdp",  # and each is cut further; gathered when its layer runs
    embed="fsdp expert",  # all other matrices are cut over all devices
    q_lora_in="fsdp expert",
    group_in="fsdp expert",
)


def get_config() -> TrainConfig:
    """The demo's run, on another mesh, in this layout."""
    return dataclasses.replace(
        demo(), run_dir="runs/own_layout", mesh="fsdp=2,expert=4", layout=mine
    )
