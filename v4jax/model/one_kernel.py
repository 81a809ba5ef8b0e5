"""Attention of a whole layer in one kernel: what it covers, and what it reads.

Shapes: B batch, S positions, Y window keys, N heads, H head dim, C entries, K chosen entries
of a query, J index dim.
Next file to read: v4jax/model/layer_choice.py.
"""

import jax

from v4jax.cache.attention_inputs import AttentionInputs, WindowKV
from v4jax.cache.layer import SPARE_ROWS, CompressedKV
from v4jax.cache.rows import all_rows
from v4jax.cache.sharded import ShardAxes
from v4jax.config import ModelConfig
from v4jax.context import Context
from v4jax.kernels.attention import gathers
from v4jax.kernels.fused_attention import op as fused_attention
from v4jax.kernels.fused_attention.operands import LayerKeys, RawQueries
from v4jax.model.indexer import IndexLoss
from v4jax.model.layer_choice import LayerChoice


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
    kernels = ctx.kernels
    name = kernels.fused_attention
    if name is None and (kernels.attention is not None or kernels.rotate is not None):
        # Whoever names one of the ops that the kernel replaces gets that op.
        name = "reference"
    fault = _fault(ctx, cfg, axes, inputs)
    if fault == "":
        queries, keys = _operands(cfg, inputs, near, segment_BY)
        lists = _chooses(ctx, cfg, inputs) and _gathers(cfg, inputs)
        gathers = cfg.index_topk if lists else 0
        fault = fused_attention.unfit(queries, keys, cfg.sliding_window, gathers)
    return fused_attention.implementation_of(name, fault) == "pallas_tpu"


def in_one_kernel(
    ctx: Context,
    cfg: ModelConfig,
    axes: ShardAxes,
    inputs: AttentionInputs,
    near: WindowKV,
    segment_BY: jax.Array | None,
) -> tuple[jax.Array, IndexLoss | None]:
    """(output [B,S,N,H], rotated back; the indexer's loss or None)."""
    queries, keys = _operands(cfg, inputs, near, segment_BY)
    learns = ctx.sparse.train_indexer and inputs.index is not None
    chooses = _chooses(ctx, cfg, inputs)
    chosen = None
    if learns or chooses:
        chosen = LayerChoice(ctx, cfg, axes, inputs, near, segment_BY)
    if chosen is not None and chooses:
        if _gathers(cfg, inputs):
            keys = keys._replace(slot_BSK=chosen.slot_BSK())
        else:
            keys = keys._replace(chosen_BSC=chosen.mask_BSC())
    one_kernel = fused_attention.IMPLEMENTATIONS["pallas_tpu"]
    together = cfg.num_attention_heads // cfg.o_groups
    out_BSNH, mass = one_kernel(queries, keys, cfg.sliding_window, together, learns)
    if chosen is None or mass is None:
        return out_BSNH, None
    mass = jax.lax.psum(mass, axes.heads) if axes.heads else mass
    return out_BSNH, chosen.loss(mass, keys.chosen_BSC, keys.slot_BSK)


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
