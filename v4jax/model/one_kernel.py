"""Attention of a whole layer in one kernel: what it covers, and what it reads.

Shapes: B batch, S positions, T query positions of a chunk, Y window keys, N heads, H head dim, C
entries, I index heads, J index dim.
Next file to read: v4jax/kernels/fused_attention/op.py.
"""

import jax
import jax.numpy as jnp

from v4jax.cache.attention_inputs import AttentionInputs, WindowKV
from v4jax.cache.layer import SPARE_ROWS, CompressedKV
from v4jax.cache.rows import all_rows
from v4jax.cache.sharded import ShardAxes
from v4jax.config import ModelConfig
from v4jax.context import Context
from v4jax.kernels.attention import chunks_of, gathers
from v4jax.kernels.fused_attention import op as fused_attention
from v4jax.kernels.fused_attention.operands import LayerKeys, RawQueries
from v4jax.kernels.queries import Queries, cut
from v4jax.model.entries import choose


def takes_one_kernel(
    ctx: Context,
    cfg: ModelConfig,
    axes: ShardAxes,
    inputs: AttentionInputs,
    near: WindowKV,
    segment_BY: jax.Array | None,
) -> bool:
    """Whether one kernel computes the layer: it is named, or is the platform's best and can.

    Raises:
      ValueError: it is named and cannot.
    """
    kernels, name = ctx.kernels, ctx.kernels.fused_attention
    if name is None and (kernels.attention is not None or kernels.rotate is not None):
        # Whoever names one of the ops that the kernel replaces gets that op.
        name = "reference"
    fault = _fault(ctx, cfg, axes, inputs)
    if fault == "":
        queries, keys = _operands(cfg, inputs, near, segment_BY)
        fault = fused_attention.unfit(queries, keys, cfg.sliding_window)
    return fused_attention.implementation_of(name, fault) == "pallas_tpu"


def in_one_kernel(
    ctx: Context,
    cfg: ModelConfig,
    axes: ShardAxes,
    inputs: AttentionInputs,
    near: WindowKV,
    segment_BY: jax.Array | None,
) -> jax.Array:
    """The output [B,S,N,H], rotated back."""
    queries, keys = _operands(cfg, inputs, near, segment_BY)
    if _chooses(ctx, cfg, inputs):
        chosen_BSC = _chosen(ctx, cfg, axes, inputs, near, segment_BY)
        keys = keys._replace(chosen_BSC=chosen_BSC)
    one_kernel = fused_attention.IMPLEMENTATIONS["pallas_tpu"]
    together = cfg.num_attention_heads // cfg.o_groups
    return one_kernel(queries, keys, cfg.sliding_window, together)


def _fault(ctx: Context, cfg: ModelConfig, axes: ShardAxes, inputs: AttentionInputs) -> str:
    """What of the layer the kernel does not compute, whatever its sizes; "" for nothing."""
    few = inputs.q_BSNH.shape[1] <= max(cfg.sliding_window, SPARE_ROWS)
    if inputs.past is not None and few:
        return "a few tokens that continue a row, whose window keys are a ring in any order"
    if axes.slots:
        return "a cache that is cut along the sequence"
    cached = inputs.index is not None and isinstance(inputs.index.key_BCJ, CompressedKV)
    if cached and _chooses(ctx, cfg, inputs):
        return "a choice among the entries of a cache"
    if inputs.index is not None and ctx.sparse.train_indexer:
        return "a layer whose indexer trains; its loss needs the mass of every entry"
    if _chooses(ctx, cfg, inputs) and _gathers(cfg, inputs):
        return (
            f"{_slots(inputs)} entries, of which each query gathers {cfg.index_topk}; "
            "only a mask over all entries is supported"
        )
    return ""


def _slots(inputs: AttentionInputs) -> int:
    return 0 if inputs.entries is None else inputs.entries.last_BC.shape[1]


def _gathers(cfg: ModelConfig, inputs: AttentionInputs) -> bool:
    return gathers(_slots(inputs), inputs.q_BSNH.shape[1], cfg.index_topk)


def _chooses(ctx: Context, cfg: ModelConfig, inputs: AttentionInputs) -> bool:
    """Whether queries attend to some of the entries that they see."""
    return inputs.index is not None and not ctx.sparse.dense and _slots(inputs) > cfg.index_topk


def _operands(
    cfg: ModelConfig, inputs: AttentionInputs, near: WindowKV, segment_BY: jax.Array | None
) -> tuple[RawQueries, LayerKeys]:
    """What the kernel reads, without a choice of entries."""
    queries = RawQueries(inputs.q_BSNH, inputs.rope, cfg.rms_norm_eps)
    keys = LayerKeys(near.rows_BYH, inputs.sink_N, near.start_B, inputs.segment_BS, segment_BY)
    if inputs.entries is None:
        return queries, keys
    entry_BCH, last_BC, segment_BC = inputs.entries
    keys = keys._replace(entry_BCH=all_rows(entry_BCH, inputs.q_BSNH.dtype))
    return queries, keys._replace(last_BC=last_BC, segment_BC=segment_BC)


def _chosen(
    ctx: Context,
    cfg: ModelConfig,
    axes: ShardAxes,
    inputs: AttentionInputs,
    near: WindowKV,
    segment_BY: jax.Array | None,
) -> jax.Array:
    """Mask [B,S,C] of the entries that each query chooses, found chunk by chunk."""
    inputs, near = jax.lax.stop_gradient((inputs, near))
    entries, index = inputs.entries, inputs.index
    assert entries is not None and index is not None, "a layer that chooses has both"
    batch, seq, heads = index.q_BSIJ.shape[:3]
    blocks, chunks = chunks_of(batch, seq, cfg.sliding_window, heads * _slots(inputs))
    queries = cut(
        inputs.q_BSNH,
        near.rows_BYH,
        near.start_B,
        near.position_BY,
        inputs.segment_BS,
        segment_BY,
        (index.q_BSIJ, index.w_BSI),
        cfg.sliding_window,
        blocks,
        chunks,
    )

    def one(chunk: Queries) -> jax.Array:
        mask_BTC = choose(ctx, cfg, axes, chunk, entries, index.key_BCJ)[0].mask_BTC
        return jnp.broadcast_to(mask_BTC, (batch, *mask_BTC.shape[1:]))

    mask_BTC = jax.lax.map(one, queries)
    return jnp.moveaxis(mask_BTC, 0, 1).reshape(batch, -1, mask_BTC.shape[-1])[:, :seq]
