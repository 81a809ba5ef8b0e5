"""Attention: one softmax over the last W tokens, compressed entries and a sink.

Keys are values, and all query heads share one key/value head (docs/equations.md#attention). Every
layer attends to the window of the last W raw tokens. HCA layers also attend to every visible entry,
CSA layers to the entries that the indexer chooses.

Shapes: B batch, S positions, N heads, H head dim, Q query rank, G output groups, O output rank, D
hidden, C entries, I width of a group of heads.
Next file to read: v4jax/model/attend.py.
"""

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from v4jax.cache.attention_inputs import AttentionInputs
from v4jax.cache.layer import CacheView, LayerCache
from v4jax.cache.quantized import as_kept
from v4jax.cache.rows import window_rows
from v4jax.config import CSA, WINDOW_ONLY
from v4jax.context import Context
from v4jax.model.adapted import Weight, grouped_product
from v4jax.model.attend import attend
from v4jax.model.compressor import Compressor
from v4jax.model.indexer import Indexer
from v4jax.model.norm import RMSNorm
from v4jax.model.segments import Segments
from v4jax.model.weights import Weights
from v4jax.model.windows import entries_of
from v4jax.quant.fake import fp8_keys
from v4jax.remat import PRODUCTS


class Attention(Weights):
    """Low-rank queries, one shared key/value head, grouped output projection.

    docs/equations.md#attention, report 2.3.
    """

    ratio: int

    @nn.compact
    def __call__(self, x_BSD: jax.Array, segments: Segments, view: CacheView | None = None):
        """(output [B,S,D], cache view with this chunk or None, the indexer's loss or None)."""
        cfg, dim, heads = self.cfg, self.cfg.head_dim, self.cfg.num_attention_heads
        wq_a = self.matrix("wq_a")
        wq_b = self.matrix("wq_b")
        wkv = self.matrix("wkv")
        wo_a = self.matrix("wo_a")
        wo_b = self.matrix("wo_b")
        sink_N = self.weight("attn_sink")
        rope = segments.rope if self.ratio == WINDOW_ONLY else segments.compressed_rope
        windows = segments.windows.get(self.ratio)

        low_BSD = self.act_quant(x_BSD)
        qr_BSQ = RMSNorm(self.ctx, cfg, name="q_norm")(self.dense(low_BSD, wq_a))
        q_BSNH = self.dense(self.act_quant(qr_BSQ), wq_b).reshape(*x_BSD.shape[:2], heads, dim)
        q_BSNH = self.ctx.rules.constrain(q_BSNH, "act_batch", "act_seq", "act_heads", None)
        kv_BSH = RMSNorm(self.ctx, cfg, name="kv_norm")(self.dense(low_BSD, wkv))
        kv_BSH = self.rotate(kv_BSH, rope)
        kv_BSH = fp8_keys(kv_BSH, cfg.qk_rope_head_dim) if self.ctx.quant == "official" else kv_BSH
        entry_BCH = index = past = entry_kept = index_kept = None
        if self.ratio != WINDOW_ONLY:
            compressor = Compressor(self.ctx, cfg, self.ratio, dim, name="compressor")
            entry_BCH, entry_kept = compressor(
                x_BSD, windows, None if view is None else view.with_arrays(view.cache.entry)
            )
        if self.ratio == CSA:
            indexer = Indexer(self.ctx, cfg, name="indexer")
            index, index_kept = indexer(
                x_BSD,
                qr_BSQ,
                rope,
                windows,
                None if view is None else view.with_arrays(view.cache.index),
            )
        if view is not None:
            kv_BSH = as_kept(view.cache.window, kv_BSH)
            window, past = window_rows(
                view.cache.window, view.layer, kv_BSH, view.span, cfg.sliding_window
            )
            view = view.with_arrays(
                LayerCache(
                    window,
                    *(None if part is None else part.cache for part in (entry_kept, index_kept)),
                )
            )
        entries = entries_of(self.ratio, entry_BCH, windows)
        inputs = AttentionInputs(
            q_BSNH, rope, kv_BSH, sink_N, segments.segment_BS, entries, index, past
        )
        out_BSNH, loss = attend(self.ctx, cfg, inputs)
        low_BSD = self.act_quant(narrowed(self.ctx, out_BSNH, wo_a, cfg.o_groups))
        return self.dense(low_BSD, wo_b), view, loss


def narrowed(ctx: Context, o_BSNH: jax.Array, wo_a: Weight, groups: int) -> jax.Array:
    """[B,S,G*O]: each group of heads through its own block of wo_a [(N/G)*H, G*O]."""
    o_BSGI = o_BSNH.reshape(*o_BSNH.shape[:2], groups, -1)
    low_BSGO = grouped_product(ctx, o_BSGI, wo_a)
    return checkpoint_name(low_BSGO.reshape(*o_BSNH.shape[:2], -1), PRODUCTS)
