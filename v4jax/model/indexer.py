"""The lightning indexer of CSA layers: cheap scores that choose the entries a query attends to (report 2.3.1).

    I[t,c] = sum_h w[t,h] * relu(q[t,h] . K[c]),  w = (x @ weights_proj) * J^-0.5 * I^-0.5          (float32)

No gradient passes the choice; the indexer has its own loss (not built yet), so here its inputs are constants.

Shapes: B batch, T query positions of a chunk, C compressed entries, I index heads, J index dim, K chosen entries.
Next file to read: v4jax/model/moe.py.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sharding.counting import running_sum
from v4jax.config import CSA, ModelConfig
from v4jax.model.compressor import Compressor
from v4jax.model.documents import Entries
from v4jax.model.rotary import Rotation, rotate
from v4jax.model.state import Kept, Slots, all_rows
from v4jax.model.weights import Weights
from v4jax.quant.fake import mxfp4_rotated


class IndexInputs(NamedTuple):
    """q_BTIJ and w_BTI of some queries, key_BCJ of all entries."""

    q_BTIJ: jax.Array
    w_BTI: jax.Array
    key_BCJ: jax.Array | Slots


def index_scores(index: IndexInputs) -> jax.Array:
    """I[t,c], float32 [B,T,C], before any mask. The only array with heads and entries lives inside this call."""
    dots = jnp.einsum("BTIJ,BCJ->BTIC", index.q_BTIJ, all_rows(index.key_BCJ), preferred_element_type=jnp.float32)
    return jnp.einsum("BTIC,BTI->BTC", jax.nn.relu(dots), index.w_BTI)


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
        slots = 0 if entries is None else entries.first_BC.shape[1] if kept is None else kept.cache.slots.shape[2]
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
