"""Which compressed entries the queries of a chunk attend to.

HCA layers attend to every visible entry, CSA layers to those that the indexer chooses. Where the
indexer's heads are cut, their scores are added before entries are chosen. Where the cache is cut
along the sequence, each device chooses among its own slots, and the best of all devices count.

Shapes: B batch, S positions, T query positions of a chunk, C entries, K chosen entries, N heads, H
head dim, I index heads, J index dim.
Next file to read: v4jax/kernels/attention.py.
"""

import jax
import jax.numpy as jnp

from sharding.manual import first_row
from v4jax.cache.attention_inputs import Entries
from v4jax.cache.layer import CompressedKV
from v4jax.cache.rows import all_rows, chosen_rows, key_reader
from v4jax.cache.sharded import ShardAxes, among_all
from v4jax.config import CSA, ModelConfig
from v4jax.context import Context
from v4jax.kernels.attention import EntryKeys, gathers
from v4jax.kernels.index_scores import KeyReader, index_scores
from v4jax.kernels.index_search import best_slots, may_search
from v4jax.kernels.queries import Queries
from v4jax.kernels.top_k import top_k, top_k_mask


def choose(
    ctx: Context,
    cfg: ModelConfig,
    axes: ShardAxes,
    chunk: Queries,
    entries: Entries,
    index_key: jax.Array | CompressedKV | None,
) -> tuple[EntryKeys, jax.Array | None]:
    """(entries that the queries attend to, their index scores or None).

    They are all visible entries, or the chosen ones: under a mask, or gathered for each query,
    whichever is cheaper at that length. The scores have the shape of the mask.
    """
    dtype, topk = chunk.q_BTNH.dtype, cfg.index_topk
    kernels, sparse = ctx.kernels, ctx.sparse
    if index_key is None or chunk.index is None:
        visible_BTC = _visible(chunk, entries)
        return EntryKeys(all_rows(entries.entry_BCH, dtype), visible_BTC), None
    q_BTIJ, w_BTI = chunk.index
    keys = key_reader(index_key, q_BTIJ.dtype)
    # An axis of one device cuts nothing.
    whole = ctx.rules.shards("index_heads") == 1
    if whole and isinstance(keys, KeyReader) and may_search(keys, topk, kernels):
        position_BT = chunk.position_BT - CSA * first_row(axes.slots, keys.count)
        score_BTK, index_BTK = best_slots(q_BTIJ, w_BTI, keys, position_BT, CSA, topk, kernels)
    else:
        visible_BTC, score_BTC = visible_scores(ctx, axes, chunk, entries, index_key)
        slots = score_BTC.shape[-1]
        if sparse.dense or (slots <= topk and not axes.slots):
            return EntryKeys(all_rows(entries.entry_BCH, dtype), visible_BTC), score_BTC
        if not axes.slots and not gathers(slots, score_BTC.shape[1], topk):
            chosen_BTC = visible_BTC & top_k_mask(score_BTC, topk, kernels.top_k)
            return EntryKeys(all_rows(entries.entry_BCH, dtype), chosen_BTC), score_BTC
        score_BTK, index_BTK = top_k(score_BTC, min(topk, slots), kernels.top_k)
    chosen_BTK = score_BTK > -jnp.inf
    if axes.slots:
        chosen_BTK &= among_all(score_BTK, topk, axes.slots)
    return EntryKeys(chosen_rows(entries.entry_BCH, index_BTK, dtype), chosen_BTK), score_BTK


def chosen_slots(
    ctx: Context,
    cfg: ModelConfig,
    axes: ShardAxes,
    chunk: Queries,
    entries: Entries,
    index_key: jax.Array | CompressedKV | None,
) -> jax.Array:
    """The entries that `choose` gathers, as a list, int32 [B,T,K]; -1 where there are fewer."""
    _, score_BTC = visible_scores(ctx, axes, chunk, entries, index_key)
    score_BTK, slot_BTK = top_k(score_BTC, cfg.index_topk, ctx.kernels.top_k)
    return jnp.where(score_BTK > -jnp.inf, slot_BTK, -1)


def visible_scores(
    ctx: Context,
    axes: ShardAxes,
    chunk: Queries,
    entries: Entries,
    index_key: jax.Array | CompressedKV | None,
) -> tuple[jax.Array, jax.Array]:
    """(which entries each query sees, their index scores; -inf for others), [B or 1,T,C]."""
    assert index_key is not None and chunk.index is not None, "a layer with an indexer"
    visible_BTC = _visible(chunk, entries)
    score_BTC = _scores(ctx, axes, chunk, chunk.index, index_key, entries)
    return visible_BTC, jnp.where(visible_BTC, score_BTC, -jnp.inf)


def _scores(
    ctx: Context,
    axes: ShardAxes,
    chunk: Queries,
    index: tuple[jax.Array, jax.Array],
    index_key: jax.Array | CompressedKV,
    entries: Entries,
) -> jax.Array:
    """Index scores of a chunk, float32 [B,T,C], before any mask.

    Blocks of slots that no query sees are skipped. The loop that does so has no gradient, so scores
    are computed for all slots where the indexer is trained.
    """
    q_BTIJ, w_BTI = index
    if not ctx.sparse.train_indexer and not isinstance(index_key, CompressedKV):
        index_key = CompressedKV(index_key[None], jnp.int32(0), _seen_slots(chunk, entries))
    keys = key_reader(index_key, q_BTIJ.dtype)
    score_BTC = index_scores(q_BTIJ, w_BTI, keys, ctx.kernels.index_scores)
    return jax.lax.psum(score_BTC, axes.index_heads) if axes.index_heads else score_BTC


def _visible(chunk: Queries, entries: Entries) -> jax.Array:
    """Mask [B or 1,T,C]: a query sees the entries of its document whose last token it has reached.

    In rows of one document these are the entries c < (t+1) // M (docs/equations.md#compressor).
    """
    seen_BTC = entries.last_BC[:, None] <= chunk.position_BT[..., None]
    if entries.segment_BC is None or chunk.segment_BT is None:
        return seen_BTC
    return seen_BTC & (entries.segment_BC[:, None] == chunk.segment_BT[..., None])


def _seen_slots(chunk: Queries, entries: Entries) -> jax.Array:
    """How many slots, from the first on, include all that the queries of the chunk see."""
    return jnp.max(
        jnp.where(
            entries.last_BC <= jnp.max(chunk.position_BT),
            jnp.arange(1, entries.last_BC.shape[1] + 1)[None],
            0,
        )
    )
