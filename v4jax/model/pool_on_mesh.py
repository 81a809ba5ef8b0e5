"""Pooling on a mesh: each device pools the entries that end in its shard of the sequence.

Shapes: B batch, S positions, H width of projections and of entries, C entries, M compress ratio;
lower case = this device's share.
Next file to read: v4jax/kernels/pooling.py.
"""

import jax
import jax.numpy as jnp

from sharding.manual import first_row, vary_like, with_rows_before
from v4jax.config import CSA
from v4jax.context import Context
from v4jax.kernels.pooling import Gated, pooling
from v4jax.model.windows import CompressionWindows


def pool(
    ctx: Context,
    c_BSH: jax.Array,
    z_BSH: jax.Array,
    ape_MH: jax.Array,
    windows: CompressionWindows,
    ratio: int,
    continued: bool = False,
) -> jax.Array:
    """Pools windows: entry = sum over tokens of softmax(z + ape) * c, per channel.

    Where the sequence is cut, each device pools the entries that end in its shard, and receives the
    positions before the shard from its neighbour.

    Args:
      c_BSH, z_BSH: float32, projections and gate logits of the tokens.
      ape_MH: float32, bias of a token's place in its window.
      windows: where each window begins and whether it overlaps one before it.
      continued: windows may begin anywhere in the rows (see segments.read_span).

    Returns:
      float32 [B,C,H]; for CSA, H is half of the projections' width.
    """
    rules, kernel, batch, seq = ctx.rules, ctx.kernels.pooling, "act_batch", "act_seq"
    # Windows follow each other without gaps in every shard if each row is one document and each
    # shard is whole windows.
    shards = rules.shards(seq)
    aligned = (
        not continued
        and windows.segment_BC is None
        and (shards == 1 or c_BSH.shape[1] // shards % ratio == 0)
    )
    first_BC = None if aligned else windows.first_BC
    if not rules:
        return _pool(c_BSH, z_BSH, ape_MH, first_BC, windows.overlaps_BC, ratio, None, kernel)
    (axis,) = rules.mesh_axes(seq) or (None,)

    def local(c_bsH, z_bsH, ape_MH, first_bC, overlaps_bC):
        ape_MH = vary_like(ape_MH, c_bsH)
        return _pool(c_bsH, z_bsH, ape_MH, first_bC, overlaps_bC, ratio, axis, kernel)

    rows = rules.spec((batch, seq, None))
    slots = rules.spec((None if windows.first_BC.shape[0] == 1 else batch, seq))
    in_specs = (rows, rows, rules.spec((None, None)), None if aligned else slots, slots)
    return jax.shard_map(local, in_specs=in_specs, out_specs=rows)(
        c_BSH, z_BSH, ape_MH, first_BC, windows.overlaps_BC
    )


def _pool(
    c_BSH, z_BSH, ape_MH, first_BC, overlaps_BC, ratio: int, axis: str | None, kernel: str | None
) -> jax.Array:
    """`pool` on one device's shard; first_BC None: windows follow each other from its start."""
    start_BC, reach = None, 0
    if first_BC is not None:
        # A window that ends in this shard may begin this many positions before it.
        reach = ratio - 1
        start_BC = jnp.maximum(first_BC - first_row(axis, c_BSH.shape[1]) + reach, 0)

    def tokens(channels: slice, reach: int) -> Gated:
        c, z = (with_rows_before(x[..., channels], reach, axis) for x in (c_BSH, z_BSH))
        return Gated(c, z, ape_MH[:, channels])

    half = c_BSH.shape[-1] // 2 if ratio == CSA else 0
    before = tokens(slice(half), reach + ratio) if ratio == CSA else None
    return pooling(tokens(slice(half, None), reach), before, overlaps_BC, start_BC, kernel)
