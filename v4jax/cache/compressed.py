"""A compressor whose rows continue: tokens from its rings, entries into its slots.

Shapes: B batch, S positions of a chunk, C entries (that may close in a chunk), W width, M tokens of
a window.
Next file to read: v4jax/cache/rows.py.
"""

import functools

import jax
import jax.numpy as jnp

from sharding.rules import AxisRules
from v4jax.cache.layer import CacheView, CompressedKV, tail_rows
from v4jax.cache.rows import fill_slots, keep_rows
from v4jax.context import Context
from v4jax.kernels.pooling import Gated
from v4jax.kernels.pooling_on_mesh import pool


def continue_pooling(
    ctx: Context,
    view: CacheView,
    tokens: Gated,
    first_BC: jax.Array,
    overlaps_BC: jax.Array,
    ratio: int,
) -> tuple[jax.Array, CacheView]:
    """(entries of windows that close in a chunk [B,C,W], the view with the chunk in its rings).

    Args:
      view: its cache is the Compressed of one compressor.
      tokens: those of the chunk.
      first_BC: int32, index of each window's first token, counted from the first of the `tail_rows`
        tokens before the chunk.
      overlaps_BC: see `pool`.
    """
    ring, (start_B, count_B) = view.cache, view.span
    c, longer_c = keep_rows(ring.c, view.layer, tokens.c_BSW, view.span)
    z, longer_z = keep_rows(ring.z, view.layer, tokens.z_BSW, view.span)

    def pooled():
        rows = tail_rows(ratio)
        longer = Gated(longer_c(rows), longer_z(rows), tokens.ape_MW)
        return pool(
            ctx.rules,
            longer,
            first_BC,
            overlaps_BC,
            ratio,
            gaps=True,
            implementation=ctx.kernels.pooling,
        )

    if ctx.rules or tokens.c_BSW.shape[1] >= ratio:
        entry_BCW = pooled()
    else:
        # In decoding, one step in `ratio` closes a window. In the other steps no query sees what
        # is written (v4jax/cache/layer.py), so zeros will do.
        closes = jnp.any((start_B + count_B) // ratio > start_B // ratio)
        nothing = functools.partial(
            jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(pooled)
        )
        # Only a CPU skips the pooling: a GPU would wait for its host to choose the branch.
        entry_BCW = jax.lax.platform_dependent(
            cpu=lambda: jax.lax.cond(closes, pooled, nothing), default=pooled
        )
    return entry_BCW, view.with_arrays(ring._replace(c=c, z=z))


def fill_entries(
    rules: AxisRules, view: CacheView, entry_BCW: jax.Array, ratio: int
) -> tuple[CompressedKV, CacheView]:
    """(CompressedKV with a chunk's entries in its slots, the view with the same slots)."""
    start_B, count_B = view.span
    slots = fill_slots(rules, view.cache.slots, view.layer, entry_BCW, start_B // ratio)
    used = jnp.max((start_B + count_B) // ratio)
    view = view.with_arrays(view.cache._replace(slots=slots))
    return CompressedKV(slots, view.layer, used), view
