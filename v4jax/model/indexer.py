"""The lightning indexer of CSA layers: cheap scores that choose the entries a query attends to.

    score[t,c] = sum_i w[t,i] * relu(q[t,i] . K[c]),  w = (x @ weights_proj) * J^-0.5 * I^-0.5

Scores are float32 (docs/equations.md#indexer, report 2.3.1).

No gradient passes the choice. The indexer learns from a loss of its own: how far softmax(score) is
from the attention's mass on the entries (docs/equations.md#indexer-loss). The sink and the window
take part in the softmax that gives this mass, so a head that attends to its window adds less. The
indexer's inputs and its target are constants: it never moves the main model.

Shapes: B batch, S positions, T query positions of a chunk, D hidden, Q query rank, C compressed
entries or their slots, I index heads, J index dim, K chosen entries, P groups of neighbouring slots
(in `_places`: words), G slots of a group.
Next file to read: v4jax/model/moe.py.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sharding.counting import running_sum
from sharding.manual import vary_like
from v4jax.cache.layer import CacheView, CompressedKV, slot_count
from v4jax.cache.rows import all_rows, some_rows
from v4jax.config import CSA
from v4jax.kernels.matmul import dense, precision_of
from v4jax.model.compressor import Compressor
from v4jax.model.rotary import Rotation, rotate
from v4jax.model.weights import Weights
from v4jax.model.windows import CompressionWindows
from v4jax.quant.fake import mxfp4_rotated

SCORE_BLOCK = 4096
"""Slots of a cache or a long row that are scored at once; four times as many for few queries.

Blocks that no query sees are skipped.
"""

FEW_QUERIES = 8
"""Fewer queries than this are decoding."""

GROUP = 32
"""Neighbouring slots of which a search reads the highest score first.

It divides SCORE_BLOCK and the number of slots of every cache that is searched.
"""


class IndexLoss(NamedTuple):
    """Sums over the queries that see an entry, float32 scalars.

    Attributes:
      kl: KL( P || softmax(score) ), P the attention's mass (docs/equations.md#indexer-loss).
      uniform: the same for equal scores.
      count: number of these queries.
    """

    kl: jax.Array
    uniform: jax.Array
    count: jax.Array


class IndexInputs(NamedTuple):
    """What scores are made of: queries and head weights of some positions, keys of all entries."""

    q_BTIJ: jax.Array
    w_BTI: jax.Array
    key_BCJ: jax.Array | CompressedKV


def index_scores(index: IndexInputs) -> jax.Array:
    """Index scores before any mask, float32 [B,T,C]; 0 in blocks after the last slot in use.

    No array with both heads and entries leaves this function.
    """
    q_BTIJ, w_BTI, keys = index
    if not isinstance(keys, CompressedKV) or keys.count <= SCORE_BLOCK:
        return _scores(q_BTIJ, w_BTI, all_rows(keys, q_BTIJ.dtype))

    def one_block(first, part, score_BTC):
        return jax.lax.dynamic_update_slice_in_dim(score_BTC, part, first, axis=2)

    return _by_blocks(index, one_block, jnp.zeros((*q_BTIJ.shape[:2], keys.count), jnp.float32))


def _by_blocks(index: IndexInputs, use, totals):
    """Folds use(first, scores [B,T,block], totals) -> totals over all blocks with slots in use.

    `first` is the first slot of a block. The last block may overlap the one before it.
    """
    q_BTIJ, w_BTI, keys = index
    block = min(keys.count, SCORE_BLOCK * (4 if q_BTIJ.shape[1] < FEW_QUERIES else 1))

    def one_block(n, totals):
        first = jnp.minimum(n * block, keys.count - block)
        return use(
            first, scores(q_BTIJ, w_BTI, some_rows(keys, first, block, q_BTIJ.dtype)), totals
        )

    scores = _scores
    if q_BTIJ.shape[1] >= FEW_QUERIES:
        scores = functools.partial(jax.lax.platform_dependent, cpu=_scores_by_head, default=_scores)

    totals = jax.tree.map(
        lambda x: vary_like(vary_like(x, q_BTIJ), jax.tree.leaves(keys.stack)[0]), totals
    )
    blocks = jnp.minimum(-(-keys.used // block), -(-keys.count // block))
    return jax.lax.fori_loop(0, blocks, one_block, totals)


def may_search(keys: jax.Array | CompressedKV, k: int) -> bool:
    """Whether `best_slots` pays: in a long cache, lax.top_k takes as long as the scores do."""
    return isinstance(keys, CompressedKV) and keys.count >= max(SCORE_BLOCK, 4 * k * GROUP)


def best_slots(index: IndexInputs, position_BT: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """(scores, slots) of the k best slots that each query sees, float32 and int32 [B,T,K].

    The slots are those of lax.top_k over all scores, ties included, in any order; scores are -inf
    where a query sees fewer than k. No second pass over the scores is needed: the peak of every
    GROUP neighbours is noted as they are scored, and the k groups of highest peak contain the k
    best slots.

    Args:
      position_BT: position of each query, counted from the first token of slot 0.
    """
    (batch, rows), slots = index.q_BTIJ.shape[:2], index.key_BCJ.count

    def one_block(first, part, totals):
        score_BTC, peak_BTP = totals
        last_C = (first + jnp.arange(part.shape[2], dtype=jnp.int32)) * CSA + CSA - 1
        part = jnp.where(last_C[None, None] <= position_BT[..., None], part, -jnp.inf)
        peaks = part.reshape(batch, rows, -1, GROUP).max(axis=-1)
        score_BTC = jax.lax.dynamic_update_slice_in_dim(score_BTC, part, first, axis=2)
        return score_BTC, jax.lax.dynamic_update_slice_in_dim(
            peak_BTP, peaks, first // GROUP, axis=2
        )

    nothing = [jnp.full((batch, rows, size), -jnp.inf) for size in (slots, slots // GROUP)]
    score_BTC, peak_BTP = _by_blocks(index, one_block, tuple(nothing))
    group_BTK = jnp.sort(best_of(peak_BTP, k)[1], axis=-1)
    near = jnp.take_along_axis(
        score_BTC.reshape(batch, rows, -1, GROUP), group_BTK[..., None], axis=2
    )
    score_BTK, place_BTK = best_of(near.reshape(batch, rows, -1), k)
    return score_BTK, jnp.take_along_axis(
        group_BTK, place_BTK // GROUP, axis=-1
    ) * GROUP + place_BTK % GROUP


def _scores(q_BTIJ: jax.Array, w_BTI: jax.Array, key_BCJ: jax.Array) -> jax.Array:
    """Index scores of the given keys, float32 [B,T,C]."""
    dots_BTIC = _dots(q_BTIJ, key_BCJ)
    return jnp.einsum(
        "BTIC,BTI->BTC", jax.nn.relu(dots_BTIC), w_BTI, precision=precision_of(dots_BTIC)
    )


def _scores_by_head(q_BTIJ: jax.Array, w_BTI: jax.Array, key_BCJ: jax.Array) -> jax.Array:
    """`_scores`, one head after another: an array of all heads would not fit a CPU's cache."""

    def add(score_BTC, head):
        q_BTJ, w_BT = head
        return score_BTC + jax.nn.relu(_dots(q_BTJ, key_BCJ)) * w_BT[..., None], None

    score_BTC = jnp.zeros((*w_BTI.shape[:2], key_BCJ.shape[1]), jnp.float32)
    score_BTC = vary_like(vary_like(score_BTC, q_BTIJ), key_BCJ)
    return jax.lax.scan(add, score_BTC, (jnp.moveaxis(q_BTIJ, 2, 0), jnp.moveaxis(w_BTI, 2, 0)))[0]


def _dots(q: jax.Array, key_BCJ: jax.Array) -> jax.Array:
    """q . K[c] in each sequence, float32 [B,...,C] for q [B,...,J]."""
    dot = functools.partial(
        jnp.einsum, precision=precision_of(q), preferred_element_type=jnp.float32
    )
    # For one query and many keys, XLA:CPU is slow at a product with a batch axis.
    if len(q) == 1:
        return dot("...J,CJ->...C", q[0], key_BCJ[0])[None]
    return dot("B...J,BCJ->B...C", q, key_BCJ)


def index_loss(
    mass_BTC: jax.Array, score_BTC: jax.Array, seen_BTC: jax.Array, real_T: jax.Array
) -> IndexLoss:
    """Sums over queries of KL( P || softmax(score) ), over the entries that each query sees.

    P is a query's mass on an entry over its mass on all (docs/equations.md#indexer-loss).

    Args:
      mass_BTC: mass that all heads give to each entry, sum_h exp(c_h) / Z_h; 0 where it is not
        seen.
      score_BTC: index scores.
      seen_BTC: which entries take part.
      real_T: False for queries that only fill up a chunk.
    """
    tiny = jnp.finfo(jnp.float32).tiny
    mass_BTC = jax.lax.stop_gradient(mass_BTC)
    p_BTC = mass_BTC / jnp.maximum(mass_BTC.sum(-1, keepdims=True), tiny)
    score_BTC = jnp.where(seen_BTC, score_BTC, jnp.finfo(jnp.float32).min)
    log_q_BTC = jnp.where(seen_BTC, jax.nn.log_softmax(score_BTC), 0)
    number_BT = jnp.broadcast_to(seen_BTC, p_BTC.shape).sum(-1)
    counts_BT = (number_BT > 0) & real_T[None]
    # Queries that give the entries no mass in float32 count, with a loss of 0: how many queries
    # count depends on the documents alone.
    learns_BT = counts_BT & (p_BTC.sum(-1) > 0)

    def total(each_BT):
        return jnp.sum(jnp.where(learns_BT, each_BT, 0))

    entropy_BT = jnp.sum(p_BTC * jnp.log(jnp.maximum(p_BTC, tiny)), axis=-1)
    uniform_BT = entropy_BT + jnp.log(jnp.maximum(number_BT, 1).astype(jnp.float32))
    return IndexLoss(
        total(entropy_BT - jnp.sum(p_BTC * log_q_BTC, axis=-1)),
        total(uniform_BT),
        counts_BT.sum().astype(jnp.float32),
    )


def top_k_mask(score_BTC: jax.Array, k: int) -> jax.Array:
    """Mask of the k largest scores of each query; of equal scores the smaller index wins.

    Example: scores [3, 1, 3, 3], k 2 -> [True, False, True, False], as lax.top_k chooses.
    """
    key_BTC = _sortable(score_BTC)
    kth = _kth_largest(key_BTC, k)
    above, level = key_BTC > kth, key_BTC == kth
    room = k - jnp.sum(above, axis=-1, keepdims=True)

    def some_of_level(_):
        return above | (level & (running_sum(level[..., None])[..., 0] <= room))

    # Usually all scores equal to the k-th fit, and nothing has to be counted.
    fits = jnp.all(jnp.sum(level, axis=-1, keepdims=True) == room)
    return jax.lax.cond(fits, lambda _: above | level, some_of_level, None)


def best_of(score_BTC: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """(scores, slots) of the k best of each query, float32 and int32 [B,T,K], in any order.

    The slots are those of lax.top_k, ties included. On CPU, where lax.top_k uses one core, all but
    a few queries search groups of neighbours instead.
    """

    def whole_rows(score_BTC):
        return tuple(jax.lax.top_k(score_BTC, k))

    if score_BTC.shape[1] < FEW_QUERIES:
        return whole_rows(score_BTC)
    return jax.lax.platform_dependent(
        score_BTC, cpu=functools.partial(_best_of_groups, k=k), default=whole_rows
    )


def _best_of_groups(score_BTC: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`best_of`, in the order of slots: the k groups of highest peak contain the k best slots."""
    batch, rows, slots = score_BTC.shape
    # About as many groups as there are slots in k groups.
    size = 1 << round(math.log2(slots / k) / 2)
    group_BTPG = jnp.pad(
        score_BTC, ((0, 0), (0, 0), (0, -slots % size)), constant_values=-jnp.inf
    ).reshape(batch, rows, -1, size)
    group_BTK = _places(top_k_mask(group_BTPG.max(-1), k), k)
    near = jnp.take_along_axis(group_BTPG, group_BTK[..., None], axis=2).reshape(batch, rows, -1)
    place_BTK = _places(top_k_mask(near, k), k)
    slot_BTK = jnp.take_along_axis(group_BTK, place_BTK // size, axis=-1) * size + place_BTK % size
    return jnp.take_along_axis(near, place_BTK, axis=-1), slot_BTK


def _places(mask_BTC: jax.Array, k: int) -> jax.Array:
    """Where the k True of each query's mask are, int32 [B,T,K], ascending.

    The mask is packed into words. Counting finds the word of the n-th True, then its bit, halving
    the word at each step.
    """
    bits = jnp.pad(mask_BTC, ((0, 0), (0, 0), (0, -mask_BTC.shape[-1] % 32))).reshape(
        *mask_BTC.shape[:2], -1, 32
    )
    value = (jnp.uint32(1) << jnp.arange(32, dtype=jnp.uint32)).reshape(1, 1, 1, 32)
    word_BTP = jnp.sum(jnp.where(bits, value, 0), axis=-1, dtype=jnp.uint32)
    upto_BTP = jnp.cumsum(jax.lax.population_count(word_BTP).astype(jnp.int32), axis=-1)
    n = jnp.arange(k, dtype=jnp.int32).reshape(1, 1, k)
    at = jnp.sum(upto_BTP[..., None, :] <= n[..., None], axis=-1, dtype=jnp.int32)
    word = jnp.take_along_axis(word_BTP, at, axis=-1)
    n = n - jnp.take_along_axis(jnp.pad(upto_BTP, ((0, 0), (0, 0), (1, 0))), at, axis=-1)
    place = at * 32
    for half in (16, 8, 4, 2, 1):
        low = jax.lax.population_count(word & jnp.uint32((1 << half) - 1)).astype(jnp.int32)
        up = n >= low
        word, n, place = (
            jnp.where(up, word >> half, word),
            jnp.where(up, n - low, n),
            place + jnp.where(up, half, 0),
        )
    return place


def _sortable(x: jax.Array) -> jax.Array:
    """uint32 keys in the order of the float32 numbers x; 0 and -0 have the same key."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits | sign, ~bits)


def _kth_largest(key_BTC: jax.Array, k: int) -> jax.Array:
    """The k-th largest key of each query, uint32 [B,T,1].

    Bits are settled from the highest down: a bit is 1 if at least k keys are still as large. On
    XLA:CPU this is faster than a sort, and counting in float32 (exact up to 2^24 keys) is faster
    than in int32.
    """

    def settle(n, kth):
        trial = kth | (jnp.uint32(1 << 31) >> n.astype(jnp.uint32))
        return jnp.where(
            jnp.sum(key_BTC >= trial, axis=-1, keepdims=True, dtype=jnp.float32) >= k, trial, kth
        )

    return jax.lax.fori_loop(0, 32, settle, vary_like(jnp.zeros_like(key_BTC[..., :1]), key_BTC))


class Indexer(Weights):
    """Declares the indexer's weights, and makes its queries, head weights and keys."""

    @nn.compact
    def __call__(
        self,
        x_BSD: jax.Array,
        qr_BSQ: jax.Array,
        rope: Rotation,
        windows: CompressionWindows | None,
        view: CacheView | None = None,
    ) -> tuple[IndexInputs | None, CacheView | None]:
        """(inputs of the scores or None, cache view or None).

        The inputs are None where no scores are needed. They are needed where there are more entries
        than may be chosen, and where the indexer is trained.
        """
        cfg, heads, dim = self.cfg, self.cfg.index_n_heads, self.cfg.index_head_dim
        wq_b = self.weight("wq_b")
        weights_proj = self.weight("weights_proj")
        slots = (
            0
            if windows is None
            else windows.first_BC.shape[1]
            if view is None
            else slot_count(view.cache.slots)
        )
        needed = (
            slots > 0
            if self.ctx.sparse.train_indexer
            else slots > cfg.index_topk and not self.ctx.sparse.dense
        )
        x_BSD, qr_BSQ = jax.lax.stop_gradient((x_BSD, qr_BSQ))
        compressor = Compressor(self.ctx, cfg, CSA, dim, True, name="compressor")
        key_BCJ, view = compressor(x_BSD, windows if needed else None, view)
        if not needed:
            return None, view
        q_BSIJ = dense(self.act_quant(qr_BSQ), wq_b).reshape(*qr_BSQ.shape[:2], heads, dim)
        w_BSI = dense(x_BSD, weights_proj).astype(jnp.float32) * (dim**-0.5 * heads**-0.5)
        q_BSIJ = rotate(q_BSIJ, rope.heads())
        q_BSIJ = mxfp4_rotated(q_BSIJ) if self.ctx.quant == "official" else q_BSIJ
        index = IndexInputs(q_BSIJ, w_BSI, key_BCJ)
        return (index if self.ctx.sparse.train_indexer else jax.lax.stop_gradient(index)), view
