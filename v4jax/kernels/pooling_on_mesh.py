"""Pooling on a mesh: each device pools the entries that end in its shard of the sequence.

Shapes: B batch, S positions, W width of projections and of entries, C entries, M tokens of a
window; lower case = this device's share.
Next file to read: v4jax/kernels/pooling.py.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sharding.manual import first_row, vary_like, with_rows_before
from sharding.rules import AxisRules
from v4jax.config import CSA
from v4jax.kernels.pooling import Gated, pooling


def pool(
    rules: AxisRules,
    tokens: Gated,
    first_BC: jax.Array,
    overlaps_BC: jax.Array,
    ratio: int,
    gaps: bool,
    implementation: str | None = None,
) -> jax.Array:
    """Pools windows: entry = sum over tokens of softmax(z + ape) * c, per channel.

    Where the sequence is cut, each device pools the entries that end in its shard, and receives the
    positions before the shard from its neighbour.

    Args:
      tokens: all of them. CSA's projections are twice as wide as its entries: their first half is
        for the window before.
      first_BC: int32 [B or 1,C], index of each window's first token.
      overlaps_BC: bool [B or 1,C], whether a window overlaps one before it.
      gaps: whether windows may begin anywhere, so that tokens between them are in none.
      implementation: see `pooling`.

    Returns:
      float32 [B,C,W]; for CSA, W is half of the projections' width.
    """
    batch, seq = "act_batch", "act_seq"
    # Without gaps, windows follow each other in every shard if each shard is whole windows.
    shards = rules.shards(seq)
    aligned = not gaps and (shards == 1 or tokens.c_BSW.shape[1] // shards % ratio == 0)
    starts_BC = None if aligned else first_BC
    if not rules:
        return _pool(tokens, starts_BC, overlaps_BC, ratio, None, implementation)
    (axis,) = rules.mesh_axes(seq) or (None,)

    def local(tokens: Gated, starts_bC, overlaps_bC):
        ape_MW = vary_like(tokens.ape_MW, tokens.c_BSW)
        tokens = tokens._replace(ape_MW=ape_MW)
        return _pool(tokens, starts_bC, overlaps_bC, ratio, axis, implementation)

    rows: Any = rules.spec((batch, seq, None))  # specs take the place of arrays
    whole: Any = rules.spec((None, None))
    slots = rules.spec((None if first_BC.shape[0] == 1 else batch, seq))
    specs = (Gated(rows, rows, whole), None if aligned else slots, slots)
    return jax.shard_map(local, in_specs=specs, out_specs=rows)(tokens, starts_BC, overlaps_BC)


def _pool(
    tokens: Gated, first_BC, overlaps_BC, ratio: int, axis: str | None, implementation: str | None
) -> jax.Array:
    """`pool` on one device's shard; first_BC None: windows follow each other from its start."""
    c_BSW, z_BSW, ape_MW = tokens
    start_BC, reach = None, 0
    if first_BC is not None:
        # A window that ends in this shard may begin this many positions before it.
        reach = ratio - 1
        start_BC = jnp.maximum(first_BC - first_row(axis, c_BSW.shape[1]) + reach, 0)

    def part(channels: slice, reach: int) -> Gated:
        c, z = (with_rows_before(x[..., channels], reach, axis) for x in (c_BSW, z_BSW))
        return Gated(c, z, ape_MW[:, channels])

    half = c_BSW.shape[-1] // 2 if ratio == CSA else 0
    before = part(slice(half), reach + ratio) if ratio == CSA else None
    return pooling(part(slice(half, None), reach), before, overlaps_BC, start_BC, implementation)
