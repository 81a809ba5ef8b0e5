"""Balances experts without a loss: each step lowers the bias of busy experts and raises idle ones'.

Equation: docs/equations.md#router-bias.
Axes: E experts; layers of a group may come first.
Next file to read: v4jax/train/muon.py.
"""

import jax.numpy as jnp

from v4jax.model.router import Routing


def update_bias(router, routing: dict[str, dict[str, Routing]], rate: float):
    """The router after bias_i += rate * sign(mean load - load_i) in each score-routed layer.

    Loads are those of the global batch.

    Args:
      router: the "router" part of the parameters; hash tables pass through.
      routing: what the step's forward pass returned, with the same groups and blocks.
      rate: how far a bias moves, 0 or more.
    """

    def block(name, group, blocks):
        state = blocks[name]["ffn"]
        if "bias" not in state:
            return blocks[name]
        load = routing[group][name].load_E
        return {
            "ffn": {"bias": state["bias"] + rate * jnp.sign(load.mean(-1, keepdims=True) - load)}
        }

    return {
        group: {name: block(name, group, blocks) for name in blocks}
        for group, blocks in router.items()
    }


def load_metrics(routing: dict[str, dict[str, Routing]]) -> dict[str, jnp.ndarray]:
    """Largest over mean expert load: the worst layer's, and the mean over layers (1 is perfect)."""
    ratios = [
        jnp.atleast_1d(route.load_E.max(-1) / jnp.maximum(route.load_E.mean(-1), 1e-9))
        for blocks in routing.values()
        for route in blocks.values()
    ]
    ratios = jnp.concatenate(ratios)
    return {"expert_load_max": ratios.max(), "expert_load_mean": ratios.mean()}
