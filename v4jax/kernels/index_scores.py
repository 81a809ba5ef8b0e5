"""The indexer's scores, of all keys at once or in blocks of a long cache.

    score[t,c] = sum_i w[t,i] * relu(q[t,i] . K[c])

Equation: docs/equations.md#indexer. Sums are float32.

Shapes: B batch, T queries, C slots of entries, I index heads, J index dim.
Next file to read: v4jax/kernels/index_search.py.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sharding.manual import vary_like
from v4jax.kernels.choice import pick
from v4jax.kernels.matmul import precision_of
from v4jax.kernels.top_k import FEW_QUERIES

SCORE_BLOCK = 4096
"""Slots that are scored at once; four times as many for few queries.

Blocks that no query sees are skipped.
"""


class KeyReader(NamedTuple):
    """Index keys that can be read in parts.

    Attributes:
      whole: gives all keys, [B,C,J].
      part: (first slot, number of slots) -> their keys.
      count: C, the number of slots.
      used: int32 scalar, number of slots in use in the longest row.
    """

    whole: Callable[[], jax.Array]
    part: Callable[[jax.Array | int, int], jax.Array]
    count: int
    used: jax.Array


def index_scores(
    q_BTIJ: jax.Array,
    w_BTI: jax.Array,
    keys: jax.Array | KeyReader,
    implementation: str | None = None,
) -> jax.Array:
    """Index scores before any mask.

    No array with both heads and entries leaves this function. Of a KeyReader with many slots only
    the blocks in use are scored, the others are 0. "reference" scores all slots.

    Args:
      q_BTIJ: queries.
      w_BTI: float32, weights of the heads.
      keys: [B,C,J], or a KeyReader.
      implementation: "reference", "all_heads" (at once) or "by_head" (one after another); None: by
        head in blocks on CPU, unless there are few queries; otherwise all heads.

    Returns:
      float32 [B,T,C].

    Raises:
      ValueError: an unknown implementation.
    """
    scores = pick("index_scores", IMPLEMENTATIONS, implementation, best="all_heads")
    if not isinstance(keys, KeyReader):
        return scores(q_BTIJ, w_BTI, keys)
    if implementation == "reference" or keys.count <= SCORE_BLOCK:
        return scores(q_BTIJ, w_BTI, keys.whole())

    def put(first, part_BTC, score_BTC):
        return jax.lax.dynamic_update_slice_in_dim(score_BTC, part_BTC, first, axis=2)

    zeros_BTC = jnp.zeros((*q_BTIJ.shape[:2], keys.count), jnp.float32)
    return fold_scores(q_BTIJ, w_BTI, keys, put, zeros_BTC, implementation)


def fold_scores(
    q_BTIJ: jax.Array,
    w_BTI: jax.Array,
    keys: KeyReader,
    use: Callable,
    totals,
    implementation: str | None = None,
    block: int | None = None,
):
    """Folds use(first, scores [B,T,block], totals) -> totals over all blocks with slots in use.

    `first` is the first slot of a block. The last block may overlap the one before it.

    Args:
      block: slots of a block; None: SCORE_BLOCK, or four times that for few queries.
    """
    if block is None:
        block = SCORE_BLOCK * (4 if q_BTIJ.shape[1] < FEW_QUERIES else 1)
    block = min(keys.count, block)
    scores = pick("index_scores", IMPLEMENTATIONS, implementation, best="all_heads")
    if implementation is None and q_BTIJ.shape[1] >= FEW_QUERIES:
        scores = functools.partial(jax.lax.platform_dependent, cpu=by_head, default=all_heads)

    def one_block(n, totals):
        first = jnp.minimum(n * block, keys.count - block)
        return use(first, scores(q_BTIJ, w_BTI, keys.part(first, block)), totals)

    key_BCJ = jax.eval_shape(lambda: keys.part(0, block))
    totals = jax.tree.map(lambda x: vary_like(vary_like(x, q_BTIJ), key_BCJ), totals)
    blocks = jnp.minimum(-(-keys.used // block), -(-keys.count // block))
    return jax.lax.fori_loop(0, blocks, one_block, totals)


def reference(q_BTIJ: jax.Array, w_BTI: jax.Array, key_BCJ: jax.Array) -> jax.Array:
    """The equation as it is written."""
    dots_BTIC = _einsum("BTIJ,BCJ->BTIC", q_BTIJ, key_BCJ)
    return _einsum("BTIC,BTI->BTC", jax.nn.relu(dots_BTIC), w_BTI)


def all_heads(q_BTIJ: jax.Array, w_BTI: jax.Array, key_BCJ: jax.Array) -> jax.Array:
    """All heads at once."""
    dots_BTIC = jax.nn.relu(_dots(q_BTIJ, key_BCJ))
    return jnp.einsum("BTIC,BTI->BTC", dots_BTIC, w_BTI, precision=precision_of(dots_BTIC))


def by_head(q_BTIJ: jax.Array, w_BTI: jax.Array, key_BCJ: jax.Array) -> jax.Array:
    """One head after another: an array of all heads would not fit a CPU's cache."""

    def add(score_BTC, head):
        q_BTJ, w_BT = head
        return score_BTC + jax.nn.relu(_dots(q_BTJ, key_BCJ)) * w_BT[..., None], None

    score_BTC = jnp.zeros((*w_BTI.shape[:2], key_BCJ.shape[1]), jnp.float32)
    score_BTC = vary_like(vary_like(score_BTC, q_BTIJ), key_BCJ)
    return jax.lax.scan(add, score_BTC, (jnp.moveaxis(q_BTIJ, 2, 0), jnp.moveaxis(w_BTI, 2, 0)))[0]


def _dots(q: jax.Array, key_BCJ: jax.Array) -> jax.Array:
    """q . K[c] in each sequence, float32 [B,...,C] for q [B,...,J]."""
    # For one query and many keys, XLA:CPU is slow at a product with a batch axis.
    if len(q) == 1:
        return _einsum("...J,CJ->...C", q[0], key_BCJ[0])[None]
    return _einsum("B...J,BCJ->B...C", q, key_BCJ)


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, precision=precision_of(a), preferred_element_type=jnp.float32)


IMPLEMENTATIONS = {"reference": reference, "all_heads": all_heads, "by_head": by_head}
