"""The lightning indexer of CSA layers: cheap scores that choose the entries a query attends to.

    score[t,c] = sum_i w[t,i] * relu(q[t,i] . K[c]),  w = (x @ weights_proj) * J^-0.5 * I^-0.5

Scores are float32 (docs/equations.md#indexer, report 2.3.1).

No gradient passes the choice. The indexer learns from a loss of its own: how far softmax(score) is
from the attention's mass on the entries (docs/equations.md#indexer-loss). The sink and the window
take part in the softmax that gives this mass, so a head that attends to its window adds less. The
indexer's inputs and its target are constants: it never moves the main model.

Shapes: B batch, S positions, T query positions of a chunk, D hidden, Q query rank, C compressed
entries or their slots, I index heads, J index dim.
Next file to read: v4jax/model/moe.py.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from v4jax.cache.attention_inputs import IndexInputs
from v4jax.cache.layer import CacheView, slot_count
from v4jax.config import CSA
from v4jax.kernels.rotate import Rotation
from v4jax.model.compressor import Compressor
from v4jax.model.weights import Weights
from v4jax.model.windows import CompressionWindows
from v4jax.quant.fake import mxfp4_rotated


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
        wq_b = self.matrix("wq_b")
        weights_proj = self.matrix("weights_proj")
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
        compressor = Compressor(self.ctx, cfg, CSA, dim, index=True, name="compressor")
        key_BCJ, view = compressor(x_BSD, windows if needed else None, view)
        if key_BCJ is None:
            return None, view
        q_BSIJ = self.dense(self.act_quant(qr_BSQ), wq_b).reshape(*qr_BSQ.shape[:2], heads, dim)
        w_BSI = self.dense(x_BSD, weights_proj).astype(jnp.float32) * (dim**-0.5 * heads**-0.5)
        q_BSIJ = self.rotate(q_BSIJ, rope.heads())
        q_BSIJ = mxfp4_rotated(q_BSIJ) if self.ctx.quant == "official" else q_BSIJ
        index = IndexInputs(q_BSIJ, w_BSI, key_BCJ)
        return (index if self.ctx.sparse.train_indexer else jax.lax.stop_gradient(index)), view
