"""Bytes that bring tokens to experts and back: the least, and those that a program sends.

Next file to read: sharding/audit.py.
"""

import math
from collections.abc import Mapping

import jax.numpy as jnp

from sharding.audit import Collective
from sharding.rules import AxisRules
from v4jax.planner.recompute import recomputes
from v4jax.train.config import TrainConfig
from v4jax.train.objective import frozen_passes


def least_expert_bytes(
    cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int], what: str = "train"
) -> int:
    """Bytes that a device must send per step so that tokens reach experts and come back.

    The load is taken as even; the result is 0 if no axis holds experts. Tokens travel there and
    back in the forward pass; in training, again where experts are recomputed, once each way as
    gradients, and in each pass of a frozen model. With K experts a token and n devices a group, a
    token is sent n-1 times where tokens are gathered, and K (n-1)/n times where they are exchanged.
    """
    holders = math.prod(sizes[axis] for axis in rules.mesh_axes("experts"))
    if holders == 1:
        return 0
    model = cfg.model
    if what == "decode":
        tokens, ways = cfg.batch_size, 2 * model.num_hidden_layers
        devices = math.prod(sizes[axis] for axis in rules.mesh_axes("act_batch"))
    else:
        tokens = cfg.batch_size * cfg.seq_len
        layers = model.num_hidden_layers + model.num_nextn_predict_layers
        ways = layers * (6 if recomputes(cfg, "routed experts") else 4)
        ways += 2 * frozen_passes(cfg) * model.num_hidden_layers
        devices = math.prod(
            sizes[axis] for axis in rules.mesh_axes("act_batch") + rules.mesh_axes("act_seq")
        )
    rows = (
        tokens
        // devices
        * (model.num_experts_per_tok * (holders - 1) / holders if rules.exchange else holders - 1)
    )
    return int(rows * ways * model.hidden_size * jnp.dtype(cfg.dtype).itemsize)


def sent_to_experts(found: list[Collective], rules: AxisRules) -> int:
    """Bytes of the collectives that the experts' dispatch makes among devices that hold experts.

    All-reduces are left out: XLA sums many gradients in one, under the joined names of all their
    sources. Every ragged all-to-all counts: nothing else makes one, and XLA:GPU does not name its
    source.
    """
    holders = set(rules.mesh_axes("experts"))
    among = [one for one in found if one.kind != "all-reduce" and set(one.axes) <= holders]
    return sum(
        one.calls * one.bytes
        for one in among
        if one.kind == "ragged-all-to-all" or "experts/shard_map" in one.source
    )
