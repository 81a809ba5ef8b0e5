"""Attention to window keys and entries: in one kernel, or in chunks of queries.

Shapes: B batch, S positions, T query positions of a chunk, Y window keys, N heads, H head dim, C
entries, I index heads, J index dim.
Next file to read: v4jax/model/one_kernel.py.
"""

import functools

import jax
import jax.numpy as jnp

from sharding.manual import first_row, with_rows_before
from v4jax.cache.attention_inputs import AttentionInputs, Entries, WindowKV
from v4jax.cache.layer import SPARE_ROWS, CompressedKV
from v4jax.cache.sharded import ShardAxes, merged, on_mesh, varying, window_before
from v4jax.config import ModelConfig
from v4jax.context import Context
from v4jax.kernels.attention import attention, chunks_of, entry_mass, gathers
from v4jax.kernels.choice import interprets
from v4jax.kernels.fused_attention import op as fused_attention
from v4jax.kernels.fused_attention.operands import RawQueries
from v4jax.kernels.queries import Queries, cut, window_keys
from v4jax.model.entries import choose
from v4jax.model.indexer import IndexLoss, index_loss
from v4jax.model.one_kernel import in_one_kernel, takes_one_kernel


def attend(
    ctx: Context, cfg: ModelConfig, inputs: AttentionInputs
) -> tuple[jax.Array, IndexLoss | None]:
    """Attends to window keys and entries: (output [B,S,N,H], the indexer's loss or None).

    Queries are normalised and rotated. The output is the softmax over (window keys, visible or
    chosen entries, sink) of q . k * H^-0.5, times the same keys, rotated back
    (docs/equations.md#attention). The loss is returned where the context says that the indexer
    trains (docs/equations.md#indexer-loss).

    Raises:
      ValueError: "pallas_tpu" is named for a layer that the kernel does not compute.
    """
    local = functools.partial(_attend, ctx, cfg)
    with jax.named_scope("scores"):
        return on_mesh(ctx.rules, local, inputs, check_vma=not interprets(ctx.kernels))


def _attend(
    ctx: Context, cfg: ModelConfig, axes: ShardAxes, inputs: AttentionInputs
) -> tuple[jax.Array, IndexLoss | None]:
    """`attend` on one device's positions and heads."""
    window = cfg.sliding_window
    segment_BS = inputs.segment_BS
    inputs = varying(inputs)
    near = window_before(inputs, window, axes.seq)
    segment_BY = None if segment_BS is None else with_rows_before(segment_BS, window, axes.seq)
    if takes_one_kernel(ctx, cfg, axes, inputs, near, segment_BY):
        return in_one_kernel(ctx, cfg, axes, inputs, near, segment_BY)
    queries = RawQueries(inputs.q_BSNH, inputs.rope, cfg.rms_norm_eps)
    attended = functools.partial(_in_chunks, ctx, cfg, axes, inputs, near, segment_BY)
    return fused_attention.IMPLEMENTATIONS["reference"](queries, attended, ctx.kernels.rotate)


def _in_chunks(
    ctx: Context,
    cfg: ModelConfig,
    axes: ShardAxes,
    inputs: AttentionInputs,
    near: WindowKV,
    segment_BY: jax.Array | None,
    q_BSNH: jax.Array,
) -> tuple[jax.Array, IndexLoss | None]:
    """Attention of normalised and rotated queries: (output, the indexer's loss or None)."""
    batch, seq = q_BSNH.shape[:2]
    window = cfg.sliding_window
    index = inputs.index
    # A few queries that continue a row are one block, which sees all keys that are given.
    few = inputs.past is not None and seq <= max(window, SPARE_ROWS)
    block = seq if few else window
    blocks, chunks = _chunks(ctx, cfg, axes, inputs, block)
    queries = cut(
        q_BSNH,
        near.rows_BYH,
        near.start_B,
        near.position_BY,
        inputs.segment_BS,
        segment_BY,
        None if index is None else (index.q_BSIJ, index.w_BSI),
        block,
        blocks,
        chunks,
    )
    keys = None if index is None else index.key_BCJ
    if axes.slots and isinstance(keys, CompressedKV):
        keys = keys._replace(used=keys.used - first_row(axes.slots, keys.count))

    def one(chunk: Queries) -> tuple[jax.Array, IndexLoss | None]:
        return _attend_chunk(ctx, cfg, axes, chunk, inputs.sink_N, inputs.entries, keys)

    if chunks == 1:
        out, loss = one(jax.tree.map(lambda x: x[0], queries))
    else:
        out, loss = jax.lax.map(jax.checkpoint(one, prevent_cse=False), queries)
        out = jnp.moveaxis(out, 0, 1).reshape(batch, -1, *out.shape[3:])
    loss = jax.tree.map(
        lambda x: jax.lax.psum(x.sum(), axes.queries) if axes.queries else x.sum(), loss
    )
    return out[:, :seq], loss


def _chunks(
    ctx: Context, cfg: ModelConfig, axes: ShardAxes, inputs: AttentionInputs, block: int
) -> tuple[int, int]:
    """(blocks in a chunk, chunks); see chunks_of."""
    batch, seq, heads, dim = inputs.q_BSNH.shape
    index = inputs.index
    slots = columns = 0 if inputs.entries is None else inputs.entries.last_BC.shape[1]
    gathered = not ctx.sparse.dense and gathers(slots, seq, cfg.index_topk)
    if index is not None and (axes.slots or gathered):
        # Gathered entries are H wide and copied for each query: they outweigh their scores.
        columns = cfg.index_topk * (1 + dim // heads)
    scores = heads * (2 * cfg.sliding_window + columns)
    if index is not None:
        scores = max(scores, index.q_BSIJ.shape[2] * slots)
    return chunks_of(batch, seq, block, scores)


def _attend_chunk(
    ctx: Context,
    cfg: ModelConfig,
    axes: ShardAxes,
    chunk: Queries,
    sink_N: jax.Array,
    entries: Entries | None,
    index_key: jax.Array | CompressedKV | None,
) -> tuple[jax.Array, IndexLoss | None]:
    """(attention of one chunk of queries [B,T,N,H], the indexer's loss or None)."""
    q_BTNH, window = chunk.q_BTNH, window_keys(chunk, cfg.sliding_window)
    attended = functools.partial(attention, q_BTNH, implementation=ctx.kernels.attention)
    if entries is None:
        return attended(window, None, sink_N)[0].astype(q_BTNH.dtype), None
    with jax.named_scope("choice"):
        chosen, score_BTC = choose(ctx, cfg, axes, chunk, entries, index_key)
    loss = None
    if axes.slots:
        near, far = attended(window, None, sink_N), attended(None, chosen, None)
        out_BTNH = merged(axes.slots, *near, *far)
    else:
        out_BTNH, lse_BTN = attended(window, chosen, sink_N)
        if ctx.sparse.train_indexer and score_BTC is not None:
            mass_BTC = entry_mass(q_BTNH, chosen, lse_BTN)
            mass_BTC = jax.lax.psum(mass_BTC, axes.heads) if axes.heads else mass_BTC
            loss = index_loss(mass_BTC, score_BTC, chosen.mask_BTC, chunk.real_T)
    return out_BTNH.astype(q_BTNH.dtype), loss
