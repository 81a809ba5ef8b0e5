"""Which entries each query of a CSA layer chooses, by its index scores: the best K that it sees.

`reference` scores and chooses by the ops `index_scores` and `top_k`, in chunks of queries
(v4jax/model/layer_choice.py). `pallas_tpu` is one kernel, and one more for a list: scores never
leave fast memory. Neither has a gradient.

Shapes: B batch, S positions, U blocks of queries, C entries, I index heads, J index dim, K chosen
entries.
Next file to read: v4jax/kernels/index_choice/best_tpu.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sharding.manual import vary_like
from v4jax.kernels.index_choice.best_tpu import BITS, QUERIES, SLOTS, Form, Search, best
from v4jax.kernels.index_choice.slots_tpu import places
from v4jax.kernels.tpu import LANES, beyond_vmem, on_tpu, padded


class Seekers(NamedTuple):
    """Queries that choose, and what they choose from.

    Attributes:
      q_BSIJ: the indexer's queries.
      w_BSI: float32, weights of its heads.
      start_B: int32 [B or 1], index in the row of the first query.
      segment_BS: documents of the queries; None where each row is one document.
      key_BCJ: the indexer's keys, one an entry.
      last_BC: int32 [B or 1,C], index in the row of the last token of each entry.
      segment_BC: documents of the entries; None likewise.
    """

    q_BSIJ: jax.Array
    w_BSI: jax.Array
    start_B: jax.Array
    segment_BS: jax.Array | None
    key_BCJ: jax.Array
    last_BC: jax.Array
    segment_BC: jax.Array | None


def mask(x: Seekers, count: int) -> jax.Array:
    """The best `count` entries that each query sees, bool [B,S,C]; of equal ones the first."""
    slots, seq = x.last_BC.shape[1], x.q_BSIJ.shape[1]
    form = _form(count, slots, seq, False)
    return _best(form, x)[:, :seq, :slots] != 0


def slot_list(x: Seekers, count: int) -> jax.Array:
    """The same as a list in any order, int32 [B,S,K]; -1 where a query sees fewer."""
    slots, seq = x.last_BC.shape[1], x.q_BSIJ.shape[1]
    form = _form(count, slots, seq, True)
    return places(_best(form, x), count, form.queries, form.interpret)[:, :seq]


def unfit(x: Seekers) -> str:
    """Why the kernel does not take these sizes, in words; "" if it does."""
    if not on_tpu():
        return ""
    dim, slots = x.q_BSIJ.shape[3], x.last_BC.shape[1]
    if dim % LANES:
        return f"index dim {dim}, which must divide by {LANES} on TPU"
    # Scores, the choice in two buffers, keys in two buffers.
    need = slots * (QUERIES * (4 + 2) + 2 * dim * x.key_BCJ.dtype.itemsize) + 16 * 2**20
    return beyond_vmem(f"a choice among {slots} entries", need)


def _form(count: int, slots: int, seq: int, in_words: bool) -> Form:
    interpret = not on_tpu()
    queries = min(QUERIES, seq) if interpret else QUERIES
    return Form(count, queries, min(SLOTS, slots) if interpret else SLOTS, in_words, interpret)


def _best(form: Form, x: Seekers) -> jax.Array:
    """The choice of the kernel, padded."""
    batch, seq, heads, dim = x.q_BSIJ.shape
    slots = x.last_BC.shape[1]
    # Words stand for whole vectors of slots; a block of slots is whole on both sides.
    unit = form.slots
    if form.in_words:
        unit = BITS * (1 if form.interpret else LANES)
        form = form._replace(slots=BITS if form.interpret else form.slots)
    more, empty = -seq % form.queries, -slots % unit
    last_BC = padded(x.last_BC, empty, jnp.iinfo(jnp.int32).max)
    search = Search(
        padded(x.q_BSIJ.reshape(batch, seq, heads * dim), more),
        padded(x.w_BSI, more),
        padded(x.key_BCJ, empty),
        last_BC[:, None],
    )
    if x.segment_BS is not None and x.segment_BC is not None:
        search = search._replace(
            segment_BS1=padded(x.segment_BS, more)[:, :, None],
            segment_B1C=padded(x.segment_BC, empty)[:, None],
        )
    end_U = form.queries * jnp.arange(1, (seq + more) // form.queries + 1, dtype=jnp.int32)
    seen_BUC = last_BC[:, None] < (x.start_B[:, None] + end_U[None])[..., None]
    number_C = jnp.arange(1, last_BC.shape[1] + 1, dtype=jnp.int32)
    seen_BU = jnp.max(jnp.where(seen_BUC, number_C[None, None], 0), axis=2)
    given = x.start_B, -(-seen_BU // form.slots), search
    return best(form, *jax.tree.map(lambda one: vary_like(one, x.q_BSIJ), given))
