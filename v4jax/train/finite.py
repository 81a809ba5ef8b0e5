"""Whether a state is fit to be kept: no NaN and no infinity in any weight, moment or router bias.

A step's loss and gradient norm are those of the weights before its update, so neither says what the
update has made of them.

Next file to read: v4jax/train/resume.py.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from v4jax.train.step import TrainState

NAMED = 3
"""Arrays that a message names; of more it gives the number."""


def not_finite(state: TrainState) -> str | None:
    """Which arrays hold a NaN or an infinity, in words; None if none does.

    It reads the state once. Every process calls it and gets the same answer.

    Example: "params/embed/weight, params/head/weight, params/norm/weight and 4 more are not finite"
    """
    tree = {"params": state.public, "optimizer": state.optimizer}
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    bad = jax.device_get(_program(state.step.sharding)(leaves))
    found = itertools.compress(paths, bad)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in found]
    if not names:
        return None
    names.sort(
        key=lambda name: not name.startswith("params")
    )  # weights say more than their moments
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more} {'is' if len(names) == 1 else 'are'} not finite"


@functools.cache
def _program(everywhere):
    """`_bad`, compiled; `everywhere`: the sharding of a scalar that all devices have."""
    return jax.jit(_bad, out_shardings=everywhere)


def _bad(leaves) -> jax.Array:
    """Which arrays hold a number that is not finite, bool [number of arrays]."""
    return jnp.stack([~jnp.isfinite(leaf).all() for leaf in leaves])
