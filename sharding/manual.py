"""Helpers inside jax.shard_map: values that differ between devices, and a neighbour's positions.

One mesh axis ("context") may cut a sequence into contiguous shards of equal length; `axis` None
means that the sequence is whole (docs/equations.md#context-parallelism).

Shapes: B batch, S positions; lower case = this device's share.

Next file to read: sharding/experts.py.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sharding.rules import AxisRules


def on_own_tokens(
    rules: AxisRules, local: Callable, *tokens: Any, whole: Any = None, check_vma: bool = True
) -> Any:
    """local(*tokens, whole), each device with its own tokens; without `whole`, local(*tokens).

    XLA left to itself gathers all tokens on every device where a reshape merges batch and sequence.

    Args:
      rules: the layout; the empty one means one device.
      tokens: arrays [B,S,...], as are all results.
      whole: arrays that every device has whole.
      check_vma: JAX tracks which values vary over the mesh. It cannot in a kernel that is
        interpreted.
    """
    inputs = tokens if whole is None else (*tokens, whole)
    if not rules:
        return local(*inputs)
    act = rules.spec(("act_batch", "act_seq"))
    specs = tuple(act for _ in tokens)
    if whole is not None:
        specs += (jax.P(),)
    return jax.shard_map(local, in_specs=specs, out_specs=act, check_vma=check_vma)(*inputs)


def vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Marks `x` as differing along `axes` of the mesh, so that its gradient is summed over them."""
    missing = tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying)
    return lax.pcast(x, missing, to="varying") if missing else x


def vary_like(x: jax.Array, reference: jax.Array) -> jax.Array:
    """Marks `x` as differing along all mesh axes that `reference` does; loop carries need that."""
    return vary(x, tuple(jax.typeof(reference).manual_axis_type.varying))


def first_row(axis: str | None, rows: int) -> jax.Array | int:
    """The position in the whole sequence where this device's shard of `rows` positions begins."""
    return lax.axis_index(axis) * rows if axis else 0


def with_rows_before(x_bs: jax.Array, rows: int, axis: str | None) -> jax.Array:
    """This device's shard with the `rows` positions before it: [b, rows + s, ...].

    What lies before the sequence is zeros. Every device sends its last positions to the next one
    and, where a shard is shorter than `rows`, to those after that.

    Example: shards of 2 positions and 3 rows. Device 2 has positions 4 and 5 and gets 1 to 5.
    """
    shard, parts, missing, hop = x_bs.shape[1], [x_bs], rows, 0
    count = lax.axis_size(axis) if axis else 1
    while missing > 0 and hop + 1 < count:
        hop += 1
        take = min(missing, shard)
        # A device that nobody sends to receives zeros.
        parts.append(
            lax.ppermute(x_bs[:, shard - take :], axis, [(i, i + hop) for i in range(count - hop)])
        )
        missing -= take
    if missing > 0:
        parts.append(jnp.zeros_like(x_bs, shape=(x_bs.shape[0], missing, *x_bs.shape[2:])))
    return jnp.concatenate(parts[::-1], axis=1)
