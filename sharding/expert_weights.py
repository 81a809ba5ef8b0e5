"""Gathers the weights of experts over the mesh axes that cut them and the tokens.

Next file to read: sharding/counting.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sharding.manual import vary
from sharding.rules import AxisRules


def whole_experts(
    rules: AxisRules, tokens: tuple[str, ...], w: Any, names: tuple[str | None, ...], dtype
) -> Any:
    """This device's experts with their full width.

    A weight of floating-point numbers is gathered over FSDP axes as numbers of `dtype`; one of
    integers (packed weights) as it is. It is marked as used by every shard of tokens.

    Args:
      w: an array, or a tree of arrays with the same axes.
    """
    return jax.tree.map(lambda part: _whole(rules, tokens, part, names, dtype), w)


def _whole(rules: AxisRules, tokens, w: jax.Array, names, dtype) -> jax.Array:
    for dim, name in enumerate(names):
        gathered = tuple(
            axis for axis in rules.mesh_axes(name) if axis in tokens and name != "experts"
        )
        if gathered and jnp.issubdtype(w.dtype, jnp.floating):
            w = _gathered(gathered, dim, dtype, w)
        elif gathered:
            w = lax.all_gather(w, gathered, axis=dim, tiled=True)
    return vary(w, tokens + rules.mesh_axes("expert_hidden"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gathered(over: tuple[str, ...], dim: int, dtype, w: jax.Array) -> jax.Array:
    """`w`, gathered as numbers of `dtype` and cast back.

    Its gradient is summed in its own dtype, not in `dtype`.
    """
    return lax.all_gather(w.astype(dtype), over, axis=dim, tiled=True).astype(w.dtype)


def _gathered_fwd(over, dim, dtype, w):
    return _gathered(over, dim, dtype, w), None


def _gathered_bwd(over, dim, dtype, _, ct):
    return (lax.psum_scatter(ct, over, scatter_dimension=dim, tiled=True),)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)
