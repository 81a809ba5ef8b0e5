"""Compression: the tokens of a compression window become one key/value entry.

A softmax for each channel weights the tokens. HCA pools the 128 tokens of a window. CSA pools 8:
the 4 of the window before (the first half of their channels, called a) and its own 4 (the second
half, b). Projections, softmax and pooling are float32 (docs/equations.md#compressor, report 2.3.1
and 2.3.2).

Shapes: B batch, S positions, D hidden, H width of projections and of entries (CSA's projections are
twice as wide as its entries), C compressed entries, M compress ratio; lower case = this device's
share.
Next file to read: v4jax/model/pool_on_mesh.py.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from sharding.rules import AxisRules
from v4jax.cache.layer import CacheView, CompressedKV, tail_rows
from v4jax.cache.rows import fill_slots, keep_rows
from v4jax.context import Context
from v4jax.model.norm import RMSNorm
from v4jax.model.pool_on_mesh import pool
from v4jax.model.weights import Weights
from v4jax.model.windows import CompressionWindows
from v4jax.quant.fake import fp8_keys, mxfp4_rotated


class Compressor(Weights):
    """Hidden states -> normalised, rotated entries [B,C,H], H = `head_dim`, in the compute dtype.

    Under quant="official" entries are rounded as the served model stores them: as keys/values, or
    as the indexer's keys (`index`).
    """

    ratio: int
    head_dim: int
    index: bool = False

    @nn.compact
    def __call__(
        self, x_BSD: jax.Array, windows: CompressionWindows | None, view: CacheView | None = None
    ):
        """(entries, None); with a view, (all entries so far, the view with this chunk).

        All entries so far are CompressedKV. Entries are None where `windows` is None.
        """
        ape = self.weight("ape", self.ratio)
        wkv = self.weight("wkv", self.ratio)
        wgate = self.weight("wgate", self.ratio)
        norm = RMSNorm(self.ctx, self.cfg, name="norm")
        # A row shorter than a window has no entries, but the norm's weight must be declared.
        if windows is None:
            norm(jnp.zeros((1, self.head_dim), self.ctx.dtype))
            return None, view
        x32 = x_BSD.astype(jnp.float32)
        c_BSH, z_BSH = self.dense(x32, wkv), self.dense(x32, wgate)
        if view is None:
            entry = pool(self.ctx, c_BSH, z_BSH, ape, windows, self.ratio)
        else:
            entry, view = _continue(self.ctx, view, c_BSH, z_BSH, ape, windows, self.ratio)
        entry = self.rotate(norm(entry.astype(self.ctx.dtype)), windows.rope)
        if self.ctx.quant == "official":
            entry = (
                mxfp4_rotated(entry) if self.index else fp8_keys(entry, self.cfg.qk_rope_head_dim)
            )
        return (entry, None) if view is None else _fill(self.ctx.rules, view, entry, self.ratio)


def _continue(
    ctx: Context,
    view: CacheView,
    c_BSH: jax.Array,
    z_BSH: jax.Array,
    ape_MH: jax.Array,
    windows: CompressionWindows,
    ratio: int,
):
    """(entries of windows that close in this chunk, before the norm; the view with new rings)."""
    ring, (start_B, count_B) = view.cache, view.span
    c, longer_c = keep_rows(ring.c, view.layer, c_BSH, view.span)
    z, longer_z = keep_rows(ring.z, view.layer, z_BSH, view.span)

    def pooled():
        return pool(
            ctx,
            longer_c(tail_rows(ratio)),
            longer_z(tail_rows(ratio)),
            ape_MH,
            windows,
            ratio,
            True,
        )

    if ctx.rules or c_BSH.shape[1] >= ratio:
        entry_BCH = pooled()
    else:
        # In decoding, one step in `ratio` closes a window. In the other steps no query sees what
        # is written (v4jax/cache/layer.py), so zeros will do.
        closes = jnp.any((start_B + count_B) // ratio > start_B // ratio)
        nothing = functools.partial(
            jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(pooled)
        )
        # Only a CPU skips the pooling: a GPU would wait for its host to choose the branch.
        entry_BCH = jax.lax.platform_dependent(
            cpu=lambda: jax.lax.cond(closes, pooled, nothing), default=pooled
        )
    return entry_BCH, view.with_arrays(ring._replace(c=c, z=z))


def _fill(
    rules: AxisRules, view: CacheView, entry_BCH: jax.Array, ratio: int
) -> tuple[CompressedKV, CacheView]:
    """(CompressedKV with the chunk's entries in its slots, the view with the same slots)."""
    start_B, count_B = view.span
    slots = fill_slots(rules, view.cache.slots, view.layer, entry_BCH, start_B // ratio)
    return CompressedKV(slots, view.layer, jnp.max((start_B + count_B) // ratio)), view.with_arrays(
        view.cache._replace(slots=slots)
    )
