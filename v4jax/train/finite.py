"""Whether a state may be saved: no weight, moment or router bias is NaN or infinite.

The loss and gradient norm of a step belong to the weights before its update, so neither shows what
the update did to them.

Next file to read: v4jax/train/resume.py.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from v4jax.train.step import TrainState

NAMED = 3
"""How many arrays a message names; it only counts the rest."""


def not_finite(state: TrainState) -> str | None:
    """Names the arrays that hold a NaN or an infinity; None if there are none.

    Reads the state once. Every process must call it, and all get the same answer.

    Example: "params/embed/weight, params/head/weight, params/norm/weight and 4 more are not finite"
    """
    tree = {"params": state.public, "optimizer": state.optimizer}
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    bad = jax.device_get(_program(state.step.sharding)(leaves))
    found = itertools.compress(paths, bad)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in found]
    if not names:
        return None
    # Weights first: they say more than their moments.
    names.sort(key=lambda name: not name.startswith("params"))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more} {'is' if len(names) == 1 else 'are'} not finite"


@functools.cache
def _program(everywhere):
    """`_bad`, compiled. `everywhere`: the sharding of a scalar that all devices have."""
    return jax.jit(_bad, out_shardings=everywhere)


def _bad(leaves) -> jax.Array:
    """Which arrays hold a number that is not finite, bool [number of arrays]."""
    return jnp.stack([~jnp.isfinite(leaf).all() for leaf in leaves])
