"""Attention: one softmax over the last W tokens, compressed entries and a sink.

Keys are values, and all query heads share one key/value head (docs/equations.md#attention). Every
layer attends to the window of the last W raw tokens. HCA layers also attend to every visible entry,
CSA layers to the entries that the indexer chooses.

Cost: blocks of W queries attend to 2W window keys, so no S x S array exists. Queries run in chunks,
so the scores of all queries against all entries never exist at once. CSA either masks the entries
that were not chosen or gathers those that were, whichever is cheaper at that length; the results
are equal.

On a mesh each device attends for its own positions and heads. Where the sequence is cut, a device
receives the W positions before its shard from its neighbour and the entries of all devices. Where
the indexer's heads are cut, their scores are added before entries are chosen. Where the cache is
cut along the sequence, each device attends to its own slots, and the partial sums are added.

Shapes: B batch, S positions, T query positions of a chunk, U blocks of a chunk, W window (the
queries of a block; the keys that a block sees, window_BUWH and its positions and documents, are
2W), V window keys, N heads, H head dim, Q query rank, G output groups, O output rank, D hidden, C
compressed entries, K chosen entries, I index heads (in `_narrow`: width of a group of heads), J
index dim.
Next file to read: v4jax/model/compressor.py.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sharding.manual import first_row, vary_like, with_rows_before
from sharding.rules import AxisRules
from v4jax.cache.layer import SPARE_ROWS, CacheView, CompressedKV, LayerCache
from v4jax.cache.quantized import as_kept
from v4jax.cache.rows import all_rows, chosen_rows, slots_spec, window_rows
from v4jax.config import CSA, WINDOW_ONLY, ModelConfig
from v4jax.context import SparseMode
from v4jax.kernels.index_scores import index_scores
from v4jax.kernels.index_search import best_slots, may_search
from v4jax.kernels.matmul import precision_of
from v4jax.kernels.top_k import FEW_QUERIES, top_k, top_k_mask
from v4jax.model.compressor import Compressor
from v4jax.model.indexer import Indexer, IndexInputs, IndexLoss, index_loss, key_reader
from v4jax.model.norm import RMSNorm, rms_norm
from v4jax.model.segments import Segments
from v4jax.model.weights import Weights
from v4jax.model.windows import CompressionWindows, whole_windows
from v4jax.quant.fake import fp8_keys

CHUNK_BYTES = 2**24
"""Limit in bytes on the float32 scores of a chunk on one device, so that they fit a CPU's cache."""

GATHER_FROM = 8
"""CSA gathers its chosen entries where there are at least this many times index_topk entries.

Below that a mask is faster (v4jax/kernels/README.md).
"""


class Queries(NamedTuple):
    """A chunk of queries, in blocks, and the window keys that each block sees.

    A block of W queries sees 2W keys: its own positions and the W before them. A few queries that
    continue a row are one block, which sees all keys that are given.

    Attributes:
      q_BTNH: queries, normalised and rotated.
      window_BUWH: keys/values of each block.
      position_BT: int32 [B or 1,T], index of each query in its row.
      window_position_BUW: int32 [B or 1,U,2W], the same for keys; negative where there is none.
      segment_BT, segment_BUW: documents of queries and keys; None where each row is one document.
      real_T: False for queries that only fill up the last chunk.
      index_q, index_w: the indexer's queries [B,T,I,J] and head weights [B,T,I]; None without it.
    """

    q_BTNH: jax.Array
    window_BUWH: jax.Array
    position_BT: jax.Array
    window_position_BUW: jax.Array
    segment_BT: jax.Array | None
    segment_BUW: jax.Array | None
    real_T: jax.Array
    index_q: jax.Array | None
    index_w: jax.Array | None


class WindowKV(NamedTuple):
    """Window keys/values of rows that are continued: those before the chunk, and the chunk's own.

    A chunk of at most SPARE_ROWS tokens gets the whole ring, whose keys may be in any order and may
    be older than the window; their positions tell.

    Attributes:
      rows_BVH: keys/values, V = W + S or the length of the ring.
      position_BV: int32, position of each; negative where there is none.
      start_B: int32, position of the chunk's first token.
    """

    rows_BVH: jax.Array
    position_BV: jax.Array
    start_B: jax.Array


class Entries(NamedTuple):
    """Compressed entries that queries may attend to.

    Attributes:
      entry_BCH: keys/values.
      last_BC: int32, index in the row of the last token of each entry's window.
      segment_BC: document of each entry; None where each row is one document.
    """

    entry_BCH: jax.Array | CompressedKV
    last_BC: jax.Array
    segment_BC: jax.Array | None


class ShardAxes(NamedTuple):
    """Mesh axes that cut the arrays of attention; None or () where an array is whole.

    Attributes:
      seq: cuts the sequence.
      index_heads: cut the indexer's heads.
      heads: cut the attention heads.
      queries: cut the queries (batch and sequence).
      slots: cuts the slots of the cache.
    """

    seq: str | None = None
    index_heads: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    queries: tuple[str, ...] = ()
    slots: str | None = None


def attend(
    rules: AxisRules,
    cfg: ModelConfig,
    q_BSNH: jax.Array,
    kv_BSH: jax.Array,
    sink_N: jax.Array,
    segments: Segments,
    windows: CompressionWindows | None = None,
    entry_BCH: jax.Array | None = None,
    index: IndexInputs | None = None,
    past: WindowKV | None = None,
    sparse: SparseMode = SparseMode(),
) -> tuple[jax.Array, IndexLoss | None]:
    """Attends to window keys and entries: (output [B,S,N,H], the indexer's loss or None).

    The output is the softmax over (window keys, visible or chosen entries, sink) of q . k * H^-0.5,
    times the same keys (docs/equations.md#attention). The loss is returned if sparse.train_indexer
    (docs/equations.md#indexer-loss).

    Args:
      q_BSNH, kv_BSH: queries and window keys/values, normalised and rotated.
      sink_N: float32, one logit per head, in the denominator only.
      windows: the windows of `entry_BCH`; None in layers of ratio 0, and in rows shorter than a
        window.
      entry_BCH: entries, normalised and rotated; all entries of the cache, as CompressedKV, where
        `past` is given.
      index: inputs of the indexer, if it chooses entries or is trained; None: all visible entries.
      past: window keys/values of rows that continue others; they replace kv_BSH.
      sparse: how CSA layers attend.
    """
    entries = None if windows is None else Entries(entry_BCH, windows.last_BC, windows.segment_BC)
    arguments = (q_BSNH, kv_BSH, sink_N, segments.segment_BS, entries, index, past)
    if not rules:
        return _attend(cfg, sparse, ShardAxes(), *arguments)
    (axis,) = rules.mesh_axes("act_seq") or (None,)
    batch, seq, heads = "act_batch", "act_seq", "act_heads"
    (slots,) = rules.mesh_axes("cache_slots") or (None,)
    split = ShardAxes(
        axis,
        *(rules.mesh_axes(name) for name in ("index_heads", heads)),
        rules.mesh_axes(batch) + rules.mesh_axes(seq),
        slots,
    )

    def spec(x, *names):
        """Partition spec of x, None if x is None. A batch of 1 (rows of one document) is whole."""
        return (
            None if x is None else rules.spec((None if x.shape[0] == 1 else names[0], *names[1:]))
        )

    specs = (
        rules.spec((batch, seq, heads, None)),
        rules.spec((batch, seq, None)),
        rules.spec((heads,)),
        spec(segments.segment_BS, batch, seq),
        None
        if entries is None
        else Entries(
            _rows_spec(rules, entries.entry_BCH),
            *(spec(x, batch, "cache_slots") for x in entries[1:]),
        ),
        None
        if index is None
        else IndexInputs(
            rules.spec((batch, seq, "index_heads", None)),
            rules.spec((batch, seq, "index_heads")),
            _rows_spec(rules, index.key_BCJ),
        ),
        None
        if past is None
        else WindowKV(
            rules.spec((batch, None, None)), rules.spec((batch, None)), rules.spec((batch,))
        ),
    )
    loss = IndexLoss(*[rules.spec(())] * 3) if sparse.train_indexer and index is not None else None
    return jax.shard_map(
        functools.partial(_attend, cfg, sparse, split), in_specs=specs, out_specs=(specs[0], loss)
    )(*arguments)


def _rows_spec(rules: AxisRules, rows: jax.Array | CompressedKV):
    """Partition spec of all entries or index keys; those of a cache stay cut as they are there."""
    if not isinstance(rows, CompressedKV):
        return rules.spec(("act_batch", None, None))
    return CompressedKV(slots_spec(rules, rows.stack), rules.spec(()), rules.spec(()))


def _attend(
    cfg: ModelConfig,
    sparse: SparseMode,
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
    blocks, chunks = _chunks(cfg, sparse, split, q_BSNH.shape, block, entries, index)
    queries = _cut(
        q_BSNH, kv_BSH, first_B, position_BV, segment_BS, segment_BV, index, block, blocks, chunks
    )
    keys = None if index is None else index.key_BCJ
    if split.slots and keys is not None:
        keys = keys._replace(used=keys.used - first_row(split.slots, keys.count))

    def one(chunk: Queries) -> tuple[jax.Array, IndexLoss | None]:
        return _attend_chunk(cfg, sparse, split, chunk, sink_N, entries, keys)

    if chunks == 1:
        out, loss = one(jax.tree.map(lambda x: x[0], queries))
    else:
        out, loss = jax.lax.map(jax.checkpoint(one, prevent_cse=False), queries)
        out = jnp.moveaxis(out, 0, 1).reshape(batch, -1, *out.shape[3:])
    loss = jax.tree.map(
        lambda x: jax.lax.psum(x.sum(), split.queries) if split.queries else x.sum(), loss
    )
    return out[:, :seq], loss


def _gathers(cfg: ModelConfig, sparse: SparseMode, slots: int, rows: int) -> bool:
    """Whether CSA gathers the entries that it chose, instead of masking the others.

    A few queries (decoding) gather whenever there are at least index_topk slots.
    """
    return (
        not sparse.dense and slots >= (GATHER_FROM if rows >= FEW_QUERIES else 1) * cfg.index_topk
    )


def _chunks(
    cfg: ModelConfig,
    sparse: SparseMode,
    split: ShardAxes,
    q_shape,
    block: int,
    entries: Entries | None,
    index: IndexInputs | None,
) -> tuple[int, int]:
    """(blocks in a chunk, chunks), such that a chunk's scores stay within CHUNK_BYTES."""
    batch, seq, heads, dim = q_shape
    slots = columns = 0 if entries is None else entries.last_BC.shape[1]
    if index is not None and (split.slots or _gathers(cfg, sparse, slots, seq)):
        # Gathered entries are H wide and copied for each query: they outweigh their scores.
        columns = cfg.index_topk * (1 + dim // heads)
    per_query = heads * (2 * cfg.sliding_window + columns)
    if index is not None:
        per_query = max(per_query, index.q_BTIJ.shape[2] * slots)
    blocks = max(1, CHUNK_BYTES // (4 * block * per_query * batch))
    chunks = -(-seq // (min(blocks, -(-seq // block)) * block))
    return -(-seq // (chunks * block)), chunks


def _cut(
    q_BSNH,
    kv_BVH,
    first_B,
    position_BV,
    segment_BS,
    segment_BV,
    index,
    block: int,
    blocks: int,
    chunks: int,
) -> Queries:
    """Pads queries to whole chunks, and stacks the chunks on a new first axis.

    Keys (kv_BVH, position_BV, segment_BV) are those of the W positions before the queries, then
    those of the queries: V = W + S. A single block takes all V keys, whatever V is.

    Example, W = 2, S = 4: the keys of positions -2 to 3 become two blocks of 2W keys,
    [-2 -1 0 1] and [0 1 2 3].
    """
    total = chunks * blocks * block

    def chunked(x):
        """[B,S,...] -> [chunks,B,T,...]."""
        x = jnp.pad(x, [(0, 0), (0, total - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, blocks * block, *x.shape[2:]), 1, 0)

    def banded(x, fill=0):
        """[B,V,...] -> [chunks,B,U,2W,...]: each block of W keys follows the one before it."""
        if block == q_BSNH.shape[1]:
            return x[None, :, None]
        before = x.shape[1] - q_BSNH.shape[1]
        x = jnp.pad(
            x,
            [(0, 0), (0, before + total - x.shape[1])] + [(0, 0)] * (x.ndim - 2),
            constant_values=fill,
        )
        x = x.reshape(x.shape[0], chunks * blocks + 1, block, *x.shape[2:])
        x = jnp.concatenate((x[:, :-1], x[:, 1:]), axis=2)
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, blocks, *x.shape[2:]), 1, 0)

    packed = segment_BS is not None
    return Queries(
        chunked(q_BSNH),
        banded(kv_BVH),
        jnp.moveaxis(
            (first_B[:, None] + jnp.arange(total, dtype=jnp.int32)[None]).reshape(
                -1, chunks, blocks * block
            ),
            1,
            0,
        ),
        banded(position_BV, fill=-1),
        chunked(segment_BS) if packed else None,
        banded(segment_BV) if packed else None,
        (jnp.arange(total) < q_BSNH.shape[1]).reshape(chunks, -1),
        None if index is None else chunked(index.q_BTIJ),
        None if index is None else chunked(index.w_BTI),
    )


def _attend_chunk(
    cfg: ModelConfig,
    sparse: SparseMode,
    split: ShardAxes,
    chunk: Queries,
    sink_N,
    entries: Entries | None,
    index_key,
):
    """(attention of one chunk of queries [B,T,N,H], the indexer's loss or None)."""
    batch, rows, heads, dim = chunk.q_BTNH.shape
    q_BUWNH = (chunk.q_BTNH * dim**-0.5).reshape(batch, chunk.window_BUWH.shape[1], -1, heads, dim)
    near = _einsum("BUWNH,BUVH->BUWNV", q_BUWNH, chunk.window_BUWH)
    near = jnp.where(
        _window_mask(chunk, cfg.sliding_window)[:, :, :, None], near, -jnp.inf
    ).reshape(batch, rows, heads, -1)
    sink_11N = sink_N[None, None]
    peak = jnp.maximum(near.max(-1), sink_11N)
    far = loss = None
    if entries is not None:
        visible_BTC, entry_BCH, score_BTC = _choose(cfg, sparse, split, chunk, entries, index_key)
        keys = "BTKH" if entry_BCH.ndim == 4 else "BKH"
        far = _einsum(f"BTNH,{keys}->BTNK", q_BUWNH.reshape(batch, rows, heads, dim), entry_BCH)
        far = jnp.where(visible_BTC[:, :, None], far, -jnp.inf)
        peak = jnp.maximum(peak, far.max(-1))
        peak = jax.lax.pmax(peak, split.slots) if split.slots else peak
    peak = jax.lax.stop_gradient(peak)[..., None]
    near = jnp.exp(near - peak)
    total = near.sum(-1) + jnp.exp(sink_11N - peak[..., 0])
    near = near.astype(chunk.q_BTNH.dtype).reshape(*q_BUWNH.shape[:-1], chunk.window_BUWH.shape[2])
    out = _einsum("BUWNV,BUVH->BUWNH", near, chunk.window_BUWH).reshape(batch, rows, heads, dim)
    if far is not None:
        far = jnp.exp(far - peak)
        add = functools.partial(jax.lax.psum, axis_name=split.slots) if split.slots else lambda x: x
        total = total + add(far.sum(-1))
        if sparse.train_indexer and index_key is not None:
            mass_BTC = jnp.sum(far / total[..., None], axis=2)
            mass_BTC = jax.lax.psum(mass_BTC, split.heads) if split.heads else mass_BTC
            loss = index_loss(mass_BTC, score_BTC, visible_BTC, chunk.real_T)
        out = out + add(_einsum(f"BTNK,{keys}->BTNH", far.astype(chunk.q_BTNH.dtype), entry_BCH))
    return (out / total[..., None]).astype(chunk.q_BTNH.dtype), loss


def _choose(
    cfg: ModelConfig,
    sparse: SparseMode,
    split: ShardAxes,
    chunk: Queries,
    entries: Entries,
    index_key,
):
    """(mask of entries to attend to [B or 1,T,C], entries [B,C,H], index scores [B,T,C] or None).

    The mask has all visible entries, or the chosen ones among them. Where chosen entries are
    gathered, the shapes are [B,T,K], [B,T,K,H] and [B,T,K].
    """
    visible_BTC, dtype, topk = _visible(chunk, entries), chunk.q_BTNH.dtype, cfg.index_topk
    if index_key is None:
        return visible_BTC, all_rows(entries.entry_BCH, dtype), None
    keys = key_reader(index_key, chunk.index_q.dtype)
    if not split.index_heads and may_search(keys, topk):
        position_BT = chunk.position_BT - CSA * first_row(split.slots, index_key.count)
        score_BTK, index_BTK = best_slots(
            chunk.index_q, chunk.index_w, keys, position_BT, CSA, topk
        )
    else:
        # Blocks of slots that no query sees are skipped. The loop that does so has no gradient, so
        # scores are computed for all slots where the indexer is trained.
        if not sparse.train_indexer and not isinstance(index_key, CompressedKV):
            seen = CompressedKV(index_key[None], jnp.int32(0), _seen_slots(chunk, entries))
            keys = key_reader(seen, chunk.index_q.dtype)
        score_BTC = index_scores(chunk.index_q, chunk.index_w, keys)
        if split.index_heads:
            score_BTC = jax.lax.psum(score_BTC, split.index_heads)
        score_BTC = jnp.where(visible_BTC, score_BTC, -jnp.inf)
        slots = score_BTC.shape[-1]
        if sparse.dense or (slots <= topk and not split.slots):
            return visible_BTC, all_rows(entries.entry_BCH, dtype), score_BTC
        if not split.slots and not _gathers(cfg, sparse, slots, score_BTC.shape[1]):
            return (
                visible_BTC & top_k_mask(score_BTC, topk),
                all_rows(entries.entry_BCH, dtype),
                score_BTC,
            )
        score_BTK, index_BTK = top_k(score_BTC, min(topk, slots))
    chosen_BTK = score_BTK > -jnp.inf
    if split.slots:
        chosen_BTK &= _among_all(score_BTK, topk, split.slots)
    return chosen_BTK, chosen_rows(entries.entry_BCH, index_BTK, dtype), score_BTK


def _among_all(score_BTK: jax.Array, topk: int, axis: str) -> jax.Array:
    """Which of this device's best scores are among the `topk` best of all devices.

    Each device holds a contiguous part of the entries, in the order of the devices, so the smaller
    index wins ties here too. K scores per query travel.
    """
    best = top_k_mask(jax.lax.all_gather(score_BTK, axis, axis=2, tiled=True), topk)
    count = score_BTK.shape[-1]
    return jax.lax.dynamic_slice_in_dim(best, jax.lax.axis_index(axis) * count, count, axis=2)


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, precision=precision_of(a), preferred_element_type=jnp.float32)


def _window_mask(chunk: Queries, window: int) -> jax.Array:
    """Mask [B or 1,U,W,2W]: a query sees itself and the W-1 tokens before it, in its document."""
    blocks = chunk.window_position_BUW.shape[1]
    position_BUW1 = chunk.position_BT.reshape(chunk.position_BT.shape[0], blocks, -1, 1)
    key_BU1W = chunk.window_position_BUW[:, :, None]
    band = (key_BU1W <= position_BUW1) & (key_BU1W > jnp.maximum(position_BUW1 - window, -1))
    if chunk.segment_BT is None:
        return band
    same = (
        chunk.segment_BT.reshape(chunk.segment_BT.shape[0], -1, window, 1)
        == chunk.segment_BUW[:, :, None]
    )
    return band & same


def _visible(chunk: Queries, entries: Entries) -> jax.Array:
    """Mask [B or 1,T,C]: a query sees the entries of its document whose last token it has reached.

    In rows of one document these are the entries c < (t+1) // M (docs/equations.md#compressor).
    """
    seen = entries.last_BC[:, None] <= chunk.position_BT[..., None]
    return (
        seen
        if entries.segment_BC is None
        else seen & (entries.segment_BC[:, None] == chunk.segment_BT[..., None])
    )


def _seen_slots(chunk: Queries, entries: Entries) -> jax.Array:
    """How many slots, from the first on, include all that the queries of the chunk see."""
    return jnp.max(
        jnp.where(
            entries.last_BC <= jnp.max(chunk.position_BT),
            jnp.arange(1, entries.last_BC.shape[1] + 1)[None],
            0,
        )
    )


class Attention(Weights):
    """Low-rank queries, one shared key/value head, grouped output projection.

    docs/equations.md#attention, report 2.3.
    """

    ratio: int

    @nn.compact
    def __call__(self, x_BSD: jax.Array, segments: Segments, view: CacheView | None = None):
        """(output [B,S,D], cache view with this chunk or None, the indexer's loss or None)."""
        cfg, dim, heads = self.cfg, self.cfg.head_dim, self.cfg.num_attention_heads
        wq_a = self.weight("wq_a")
        wq_b = self.weight("wq_b")
        wkv = self.weight("wkv")
        wo_a = self.weight("wo_a")
        wo_b = self.weight("wo_b")
        sink_N = self.weight("attn_sink")
        rope = segments.rope if self.ratio == WINDOW_ONLY else segments.compressed_rope
        windows = segments.windows.get(self.ratio)

        low_BSD = self.act_quant(x_BSD)
        qr_BSQ = RMSNorm(self.ctx, cfg, name="q_norm")(self.dense(low_BSD, wq_a))
        q_BSNH = self.dense(self.act_quant(qr_BSQ), wq_b).reshape(*x_BSD.shape[:2], heads, dim)
        q_BSNH = self.ctx.rules.constrain(q_BSNH, "act_batch", "act_seq", "act_heads", None)
        q_BSNH = self.rotate(rms_norm(q_BSNH, cfg.rms_norm_eps), rope.heads())
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
            past, window = _continue(cfg, kv_BSH, view)
            view = view.with_arrays(
                LayerCache(
                    window,
                    *(None if part is None else part.cache for part in (entry_kept, index_kept)),
                )
            )
            windows = None if entry_BCH is None else whole_windows(self.ratio, entry_BCH.count)
        out_BSNH, loss = attend(
            self.ctx.rules,
            cfg,
            q_BSNH,
            kv_BSH,
            sink_N,
            segments,
            windows,
            entry_BCH,
            index,
            past,
            self.ctx.sparse,
        )
        # Keys are values, so each value is rotated by its own position. Rotating the sum back by
        # the query's position leaves relative angles.
        out_BSNH = self.rotate(out_BSNH, rope.heads(), inverse=True)
        low_BSD = self.act_quant(_narrow(out_BSNH, wo_a, cfg.o_groups))
        return self.dense(low_BSD, wo_b), view, loss


def _continue(cfg: ModelConfig, kv_BSH: jax.Array, view: CacheView) -> tuple[WindowKV, jax.Array]:
    """(window keys of this chunk and those before it, the ring with this chunk in it)."""
    ring, rows_BVH, position_BV = window_rows(
        view.cache.window, view.layer, kv_BSH, view.span, cfg.sliding_window
    )
    return WindowKV(rows_BVH, position_BV, view.span.start_B), ring


def _narrow(o_BSNH: jax.Array, wo_a: jax.Array, groups: int) -> jax.Array:
    """[B,S,G*O]: each group of heads through its own block of wo_a [(N/G)*H, G*O]."""
    o_BSGI = o_BSNH.reshape(*o_BSNH.shape[:2], groups, -1)
    low_BSGO = jnp.einsum(
        "BSGI,IGO->BSGO",
        o_BSGI,
        wo_a.reshape(wo_a.shape[0], groups, -1),
        precision=precision_of(o_BSNH),
    )
    return low_BSGO.reshape(*o_BSNH.shape[:2], -1)
