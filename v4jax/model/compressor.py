"""Compression: the tokens of a compression window become one key/value entry.

A softmax for each channel weights the tokens. HCA pools the 128 tokens of a window. CSA pools 8:
the 4 of the window before (the first half of their channels, called a) and its own 4 (the second
half, b). Projections, softmax and pooling are float32 (docs/equations.md#compressor, report 2.3.1
and 2.3.2).

Shapes: B batch, S positions, D hidden, W width of projections and of entries (CSA's projections are
twice as wide as its entries), C compressed entries, M compress ratio.
Next file to read: v4jax/kernels/pooling_on_mesh.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from v4jax.cache.compressed import continue_pooling, fill_entries
from v4jax.cache.layer import CacheView, CompressedKV
from v4jax.kernels.pooling import Gated
from v4jax.kernels.pooling_on_mesh import pool
from v4jax.model.norm import RMSNorm
from v4jax.model.weights import Weights
from v4jax.model.windows import CompressionWindows
from v4jax.quant.fake import fp8_keys, mxfp4_rotated


class Compressor(Weights):
    """Hidden states -> normalised, rotated entries [B,C,W], W = `head_dim`, in the compute dtype.

    Under quant="official" entries are rounded as the served model stores them: as keys/values, or
    as the indexer's keys (`index`).
    """

    ratio: int
    head_dim: int
    index: bool = False

    @nn.compact
    def __call__(
        self, x_BSD: jax.Array, windows: CompressionWindows | None, view: CacheView | None = None
    ) -> tuple[jax.Array | CompressedKV | None, CacheView | None]:
        """(entries, None); with a view, (all entries so far, the view with this chunk).

        All entries so far are CompressedKV. Entries are None where `windows` is None.
        """
        ctx = self.ctx
        ape_MW = self.weight("ape", self.ratio)
        wkv = self.matrix("wkv", self.ratio)
        wgate = self.matrix("wgate", self.ratio)
        norm = RMSNorm(ctx, self.cfg, name="norm")
        # A row shorter than a window has no entries, but the norm's weight must be declared.
        if windows is None:
            norm(jnp.zeros((1, self.head_dim), ctx.dtype))
            return None, view
        x32_BSD = x_BSD.astype(jnp.float32)
        tokens = Gated(self.dense(x32_BSD, wkv), self.dense(x32_BSD, wgate), ape_MW)
        first_BC, overlaps_BC = windows.first_BC, windows.overlaps_BC
        if view is None:
            gaps, kernel = windows.segment_BC is not None, ctx.kernels.pooling
            entry = pool(ctx.rules, tokens, first_BC, overlaps_BC, self.ratio, gaps, kernel)
        else:
            entry, view = continue_pooling(ctx, view, tokens, first_BC, overlaps_BC, self.ratio)
        entry = self.rotate(norm(entry.astype(ctx.dtype)), windows.rope)
        if ctx.quant == "official":
            entry = (
                mxfp4_rotated(entry) if self.index else fp8_keys(entry, self.cfg.qk_rope_head_dim)
            )
        return (entry, None) if view is None else fill_entries(ctx.rules, view, entry, self.ratio)
