"""Gathers the weights of experts over the mesh axes that cut them and the tokens.

Next file to read: sharding/counting.py.
"""

import functools

import jax
from jax import lax

from sharding.manual import vary
from sharding.rules import AxisRules


def whole_experts(
    rules: AxisRules, tokens: tuple[str, ...], w: jax.Array, names: tuple[str | None, ...], dtype
) -> jax.Array:
    """This device's experts with their full width.

    The weight is gathered over FSDP axes as numbers of `dtype`, and marked as used by every shard
    of tokens.
    """
    for dim, name in enumerate(names):
        gathered = tuple(
            axis for axis in rules.mesh_axes(name) if axis in tokens and name != "experts"
        )
        if gathered:
            w = _gathered(gathered, dim, dtype, w)
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
