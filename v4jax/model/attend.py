"""Attention of one device's positions and heads, in chunks of queries.

Where the sequence is cut, a device receives the W positions before its shard from its neighbour and
the entries of all devices. Where the cache is cut along the sequence, each device attends to its
own slots, and the results are merged.

Shapes: B batch, S positions, T query positions of a chunk, W window, V window keys, N heads, H head
dim, C entries.
Next file to read: v4jax/model/queries.py.
"""

import functools

import jax
import jax.numpy as jnp

from sharding.manual import first_row, vary_like, with_rows_before
from v4jax.cache.layer import SPARE_ROWS
from v4jax.config import ModelConfig
from v4jax.context import Context
from v4jax.kernels.attention import attention, chunks_of, entry_mass, gathers
from v4jax.model.entries import Entries, ShardAxes, choose
from v4jax.model.indexer import IndexInputs, IndexLoss, index_loss
from v4jax.model.queries import Queries, cut, window_keys


def attend_locally(
    ctx: Context,
    cfg: ModelConfig,
    split: ShardAxes,
    q_BSNH,
    kv_BSH,
    sink_N,
    segment_BS,
    entries: Entries | None,
    index,
    past,
):
    """`attend` on one device's positions and heads, in chunks of queries."""
    batch, seq, heads, _ = q_BSNH.shape
    window = cfg.sliding_window
    # Only arrays that gradients flow to are marked as varying. Positions are not: masks must be
    # known to be equal on devices that have other heads.
    entry_BCH = None if entries is None else entries.entry_BCH
    sink_N, kv_BSH, entry_BCH = jax.tree.map(
        lambda x: vary_like(x, q_BSNH), (sink_N, kv_BSH, entry_BCH)
    )
    if entries is not None:
        entries = entries._replace(entry_BCH=entry_BCH)
    if past is None:
        block, first_B = window, jnp.reshape(first_row(split.seq, seq), 1)
        kv_BSH = with_rows_before(kv_BSH, window, split.seq)
        position_BV = first_B[:, None] + jnp.arange(-window, seq, dtype=jnp.int32)[None]
    else:
        block, first_B, position_BV = (
            seq if seq <= max(window, SPARE_ROWS) else window,
            past.start_B,
            past.position_BV,
        )
        kv_BSH = vary_like(past.rows_BVH, q_BSNH)
    segment_BV = None if segment_BS is None else with_rows_before(segment_BS, window, split.seq)
    blocks, chunks = _chunks(ctx, cfg, split, q_BSNH.shape, block, entries, index)
    queries = cut(
        q_BSNH, kv_BSH, first_B, position_BV, segment_BS, segment_BV, index, block, blocks, chunks
    )
    keys = None if index is None else index.key_BCJ
    if split.slots and keys is not None:
        keys = keys._replace(used=keys.used - first_row(split.slots, keys.count))

    def one(chunk: Queries) -> tuple[jax.Array, IndexLoss | None]:
        return _attend_chunk(ctx, cfg, split, chunk, sink_N, entries, keys)

    if chunks == 1:
        out, loss = one(jax.tree.map(lambda x: x[0], queries))
    else:
        out, loss = jax.lax.map(jax.checkpoint(one, prevent_cse=False), queries)
        out = jnp.moveaxis(out, 0, 1).reshape(batch, -1, *out.shape[3:])
    loss = jax.tree.map(
        lambda x: jax.lax.psum(x.sum(), split.queries) if split.queries else x.sum(), loss
    )
    return out[:, :seq], loss


def _chunks(
    ctx: Context,
    cfg: ModelConfig,
    split: ShardAxes,
    q_shape,
    block: int,
    entries: Entries | None,
    index: IndexInputs | None,
) -> tuple[int, int]:
    """(blocks in a chunk, chunks); see chunks_of."""
    batch, seq, heads, dim = q_shape
    slots = columns = 0 if entries is None else entries.last_BC.shape[1]
    gathered = not ctx.sparse.dense and gathers(slots, seq, cfg.index_topk)
    if index is not None and (split.slots or gathered):
        # Gathered entries are H wide and copied for each query: they outweigh their scores.
        columns = cfg.index_topk * (1 + dim // heads)
    scores = heads * (2 * cfg.sliding_window + columns)
    if index is not None:
        scores = max(scores, index.q_BTIJ.shape[2] * slots)
    return chunks_of(batch, seq, block, scores)


def _attend_chunk(
    ctx: Context,
    cfg: ModelConfig,
    split: ShardAxes,
    chunk: Queries,
    sink_N,
    entries: Entries | None,
    index_key,
) -> tuple[jax.Array, IndexLoss | None]:
    """(attention of one chunk of queries [B,T,N,H], the indexer's loss or None)."""
    q_BTNH, window = chunk.q_BTNH, window_keys(chunk, cfg.sliding_window)
    attended = functools.partial(attention, q_BTNH, implementation=ctx.kernels.attention)
    if entries is None:
        return attended(window, None, sink_N)[0].astype(q_BTNH.dtype), None
    chosen, score_BTC = choose(ctx, cfg, split, chunk, entries, index_key)
    loss = None
    if split.slots:
        near, far = attended(window, None, sink_N), attended(None, chosen, None)
        out_BTNH = _merged(split.slots, *near, *far)
    else:
        out_BTNH, lse_BTN = attended(window, chosen, sink_N)
        if ctx.sparse.train_indexer and index_key is not None:
            mass_BTC = entry_mass(q_BTNH, chosen, lse_BTN)
            mass_BTC = jax.lax.psum(mass_BTC, split.heads) if split.heads else mass_BTC
            loss = index_loss(mass_BTC, score_BTC, chosen.mask_BTC, chunk.real_T)
    return out_BTNH.astype(q_BTNH.dtype), loss


def _merged(axis: str, near_BTNH, near_lse, far_BTNH, far_lse) -> jax.Array:
    """Attention to window and sink, which all devices have, and to entries of all devices."""
    peak_BTN = jnp.maximum(near_lse, jax.lax.pmax(far_lse, axis))
    near_share, far_share = jnp.exp(near_lse - peak_BTN), jnp.exp(far_lse - peak_BTN)
    total_BTN = near_share + jax.lax.psum(far_share, axis)
    far_BTNH = jax.lax.psum(far_BTNH * far_share[..., None], axis)
    return (near_BTNH * near_share[..., None] + far_BTNH) / total_BTN[..., None]
