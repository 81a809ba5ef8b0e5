"""Whether a state may be saved: no weight, moment or router bias is NaN or infinite.

The loss and gradient norm of a step belong to the weights before its update, so neither shows what
the update did to them.

Next file to read: v4jax/train/resume.py.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from sharding.host_memory import is_on_host, to_device
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
    bad = _checked(leaves, state.step.sharding)
    found = itertools.compress(paths, bad)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in found]
    if not names:
        return None
    # Weights first: they say more than their moments.
    names.sort(key=lambda name: not name.startswith("params"))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more} {'is' if len(names) == 1 else 'are'} not finite"


def _checked(leaves, everywhere) -> list[bool]:
    """Which arrays hold a number that is not finite.

    Those of the host's memory come to the device one by one, each in a program of its own, as they
    may not fit together. One program checks the others.

    Args:
      everywhere: the sharding of a scalar that all devices have.
    """
    program = _program(everywhere)
    away = [is_on_host(leaf.sharding) for leaf in leaves]
    here = [leaf for leaf, is_away in zip(leaves, away, strict=True) if not is_away]
    rest = iter(jax.device_get(program(here)))
    return [
        bool(jax.device_get(program([leaf]))[0]) if is_away else bool(next(rest))
        for leaf, is_away in zip(leaves, away, strict=True)
    ]


@functools.cache
def _program(everywhere):
    """`_bad`, compiled."""
    return jax.jit(_bad, out_shardings=everywhere)


def _bad(leaves) -> jax.Array:
    """Which arrays hold a number that is not finite, bool [number of arrays]."""
    return jnp.stack([~jnp.isfinite(leaf).all() for leaf in to_device(leaves)])
