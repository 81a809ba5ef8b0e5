"""Small tools for code inside jax.shard_map: types of values that differ between devices, and rows of the neighbour.

A sequence may be cut over one mesh axis ("context") into contiguous shards of equal length; `axis` None means that it is whole.

Shapes: b this device's share of the batch, s of the sequence.
Next file to read: sharding/experts.py.
"""

import jax
import jax.numpy as jnp
from jax import lax


def vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Marks `x` as differing along `axes` of the mesh, so that its gradient is summed over them (once, here)."""
    missing = tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying)
    return lax.pcast(x, missing, to="varying") if missing else x


def vary_like(x: jax.Array, reference: jax.Array) -> jax.Array:
    """Marks `x` as differing along every mesh axis that `reference` differs along (loop carries need that)."""
    return vary(x, tuple(jax.typeof(reference).manual_axis_type.varying))


def first_row(axis: str | None, rows: int) -> jax.Array | int:
    """Row of the whole sequence at which this device's shard of `rows` rows begins."""
    return lax.axis_index(axis) * rows if axis else 0


def with_rows_before(x_bs: jax.Array, rows: int, axis: str | None) -> jax.Array:
    """[b, rows + s, ...]: the shard behind the `rows` rows that precede it in the sequence; zeros before its beginning.

    Every device sends its last rows to the next one; where a shard is shorter than `rows`, to the ones after that too.
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
