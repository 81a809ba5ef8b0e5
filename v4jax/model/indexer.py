"""The lightning indexer of CSA layers: cheap scores that choose the entries a query attends to (report 2.3.1).

    I[t,c] = sum_h w[t,h] * relu(q[t,h] . K[c]),  w = (x @ weights_proj) * J^-0.5 * I^-0.5          (float32)

No gradient passes the choice; the indexer has its own loss (not built yet), so here its inputs are constants.

Shapes: B batch, T query positions of a chunk, C compressed entries, I index heads, J index dim, K chosen entries.
Next file to read: v4jax/model/moe.py.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sharding.counting import running_sum
from sharding.manual import vary_like
from v4jax.config import CSA, ModelConfig
from v4jax.model.compressor import Compressor
from v4jax.model.documents import Entries
from v4jax.model.rotary import Rotation, rotate
from v4jax.model.state import Kept, Slots, all_rows, slot_count, some_rows
from v4jax.model.weights import Weights
from v4jax.quant.fake import mxfp4_rotated


SCORE_BLOCK = 4096
"""Slots of a cache that are scored at once; blocks that nothing was written to are left out."""

LONG_ROW = 32
"""Rows of so many times k are searched by way of maxima (benchmarks/topk.py)."""


class IndexInputs(NamedTuple):
    """q_BTIJ and w_BTI of some queries, key_BCJ of all entries."""

    q_BTIJ: jax.Array
    w_BTI: jax.Array
    key_BCJ: jax.Array | Slots


def index_scores(index: IndexInputs) -> jax.Array:
    """I[t,c], float32 [B,T,C], before any mask. The only array with heads and entries lives inside this call."""
    q_BTIJ, w_BTI, keys = index
    if not isinstance(keys, Slots) or keys.count <= SCORE_BLOCK:
        return _scores(q_BTIJ, w_BTI, all_rows(keys, q_BTIJ.dtype))

    def one_block(n, score_BTC):
        first = jnp.minimum(n * SCORE_BLOCK, keys.count - SCORE_BLOCK)
        part = _scores(q_BTIJ, w_BTI, some_rows(keys, first, SCORE_BLOCK, q_BTIJ.dtype))
        return jax.lax.dynamic_update_slice_in_dim(score_BTC, part, first, axis=2)

    score_BTC = vary_like(jnp.zeros((*q_BTIJ.shape[:2], keys.count), jnp.float32), q_BTIJ)
    return jax.lax.fori_loop(0, -(-keys.used // SCORE_BLOCK), one_block, score_BTC)


def _scores(q_BTIJ: jax.Array, w_BTI: jax.Array, key_BCJ: jax.Array) -> jax.Array:
    dots = jnp.einsum("BTIJ,BCJ->BTIC", q_BTIJ, key_BCJ, preferred_element_type=jnp.float32)
    return jnp.einsum("BTIC,BTI->BTC", jax.nn.relu(dots), w_BTI)


def largest(score_BTC: jax.Array, k: int) -> jax.Array:
    """lax.top_k(score, k)[1], exactly, ties included; long rows by way of the maxima of short stretches.

    The k largest scores lie in the k stretches with the largest maxima (of equal ones the first). With stretches of about
    (C/k)^0.5 the two small searches look at 2 (C k)^0.5 numbers instead of C; a search costs 100 times what a maximum does.
    """
    slots = score_BTC.shape[-1]
    if slots < LONG_ROW * k:
        return jax.lax.top_k(score_BTC, k)[1]
    size = 1 << round(math.log2(slots / k) / 2)
    padded = jnp.pad(score_BTC, ((0, 0), (0, 0), (0, -slots % size)), constant_values=-jnp.inf)
    score_BTPU = padded.reshape(*score_BTC.shape[:2], -1, size)
    stretch_BTK = jnp.sort(jax.lax.top_k(jnp.max(score_BTPU, axis=-1), k)[1], axis=-1)  # in order, so that ties stay in order
    candidate_BTN = jnp.take_along_axis(score_BTPU, stretch_BTK[..., None], axis=2).reshape(*score_BTC.shape[:2], -1)
    place_BTK = jax.lax.top_k(candidate_BTN, k)[1]
    return jnp.take_along_axis(stretch_BTK, place_BTK // size, axis=-1) * size + place_BTK % size


def top_k_mask(score_BTC: jax.Array, k: int) -> jax.Array:
    """True at the k largest scores of each query; of equal scores the smaller index wins, as in lax.top_k.

    Example: scores [3, 1, 3, 3], k 2 -> [True, False, True, False].
    """
    kth = jax.lax.top_k(score_BTC, k)[0][..., -1:]
    above, level = score_BTC > kth, score_BTC == kth
    room = k - jnp.sum(above, axis=-1, keepdims=True)
    return above | (level & (running_sum(level[..., None])[..., 0] <= room))


class Indexer(Weights):
    """Declares the indexer and gives its queries, head weights and keys; None where no choice has to be made."""

    cfg: ModelConfig

    @nn.compact
    def __call__(
        self, x_BSD: jax.Array, qr_BSQ: jax.Array, turn: Rotation, entries: Entries | None, kept: Kept | None = None
    ) -> tuple[IndexInputs | None, Kept | None]:
        cfg, heads, dim = self.cfg, self.cfg.index_n_heads, self.cfg.index_head_dim
        init = nn.initializers.normal(cfg.initializer_range)
        wq_b = self.weight("wq_b", (qr_BSQ.shape[-1], heads * dim), ("q_lora_in", "index_heads"), init, low=True)
        weights_proj = self.weight("weights_proj", (x_BSD.shape[-1], heads), ("embed", "index_heads"), init)
        slots = 0 if entries is None else entries.first_BC.shape[1] if kept is None else slot_count(kept.cache.slots)
        choice = slots > cfg.index_topk
        x_BSD, qr_BSQ = jax.lax.stop_gradient((x_BSD, qr_BSQ))
        compressor = Compressor(*self.own, cfg, CSA, dim, True, name="compressor")
        key_BCJ, kept = compressor(x_BSD, entries if choice else None, kept)
        if not choice:
            return None, kept
        q_BSIJ = (self.act_quant(qr_BSQ) @ wq_b).reshape(*qr_BSQ.shape[:2], heads, dim)
        w_BSI = (x_BSD @ weights_proj).astype(jnp.float32) * (dim**-0.5 * heads**-0.5)
        q_BSIJ = rotate(q_BSIJ, turn.heads())
        q_BSIJ = mxfp4_rotated(q_BSIJ) if self.quant == "official" else q_BSIJ
        return jax.lax.stop_gradient(IndexInputs(q_BSIJ, w_BSI, key_BCJ)), kept
