"""Whether what a step made is fit to be kept: no NaN and no infinity in any weight, momentum, moment or router bias.

A step's loss and gradient norm are those of the weights before its update, so neither says what the update has made of them.

Next file to read: v4jax/train/resume.py.
"""

import functools

import jax
import jax.numpy as jnp

from v4jax.train.step import TrainState

NAMED = 3
"""Arrays that a message names; of more it gives the number."""


def not_finite(state: TrainState) -> str | None:
    """Which arrays hold a NaN or an infinity, in words; None if none does. Every process calls it and gets the same answer.

    It reads the state once, and one bool an array travels.

    Example: "params/embed/weight, optimizer/1/inner_states/adamw/inner_state/0/mu/embed/weight are not finite".
    """
    tree = {"params": state.public, "optimizer": state.optimizer}
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    bad = jax.device_get(_program(state.step.sharding)(leaves))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, is_bad in zip(paths, bad, strict=True) if is_bad]
    if not names:
        return None
    names.sort(key=lambda name: not name.startswith("params"))  # the weights first: their moments are bad for the same reason
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more} {'is' if len(names) == 1 else 'are'} not finite"


@functools.cache
def _program(everywhere):
    """The compiled look at every array; `everywhere`: the sharding of a scalar that all devices have."""
    return jax.jit(_bad, out_shardings=everywhere)


def _bad(leaves) -> jax.Array:
    """bool [number of arrays]"""
    return jnp.stack([~jnp.isfinite(leaf).all() for leaf in leaves])
