"""What all queries of a layer choose, and the indexer's loss, where one kernel attends.

Both are made in chunks of queries. A mask of the layer exists, and the mass of its entries, but not
its scores by head.

Shapes: B batch, S positions, T query positions of a chunk, Y window keys, N heads, H head dim, C
entries, I index heads, J index dim.
Next file to read: v4jax/kernels/fused_attention/op.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax.cache.attention_inputs import AttentionInputs, WindowKV
from v4jax.cache.sharded import ShardAxes
from v4jax.config import ModelConfig
from v4jax.context import Context
from v4jax.kernels.attention import chunks_of
from v4jax.kernels.queries import Queries, cut, in_chunks
from v4jax.model.entries import choose
from v4jax.model.indexer import IndexLoss, index_loss


class LayerChoice(NamedTuple):
    """A layer whose indexer chooses entries, or learns; see `choose` (v4jax/model/entries.py)."""

    ctx: Context
    cfg: ModelConfig
    axes: ShardAxes
    inputs: AttentionInputs
    near: WindowKV
    segment_BY: jax.Array | None

    def mask_BSC(self) -> jax.Array:
        """Which entries each query attends to; without gradient."""
        choice = self._replace(inputs=jax.lax.stop_gradient(self.inputs))
        batch, seq = self.inputs.q_BSNH.shape[:2]

        def one(chunk: Queries) -> jax.Array:
            mask_BTC = choice._choose(chunk)[0]
            return jnp.broadcast_to(mask_BTC, (batch, *mask_BTC.shape[1:]))

        mask_BTC = jax.lax.map(one, choice._chunks())
        return jnp.moveaxis(mask_BTC, 0, 1).reshape(batch, -1, mask_BTC.shape[-1])[:, :seq]

    def loss(self, mass_BSC: jax.Array, mask_BSC: jax.Array | None) -> IndexLoss:
        """The loss of all queries (docs/equations.md#indexer-loss).

        Args:
          mass_BSC: what all heads give to each entry.
          mask_BSC: which entries were chosen; None: all that a query sees.
        """
        queries = self._chunks()
        chunks = queries.real_T.shape[0]
        total = queries.real_T.size
        mass, mask = jax.tree.map(lambda x: in_chunks(x, chunks, total), (mass_BSC, mask_BSC))

        def one(chunk: tuple[Queries, jax.Array, jax.Array | None]) -> IndexLoss:
            queries, mass_BTC, mask_BTC = chunk
            seen_BTC, score_BTC = self._choose(queries)
            mask_BTC = seen_BTC if mask_BTC is None else mask_BTC
            return index_loss(mass_BTC, score_BTC, mask_BTC, queries.real_T)

        sums = jax.lax.map(jax.checkpoint(one, prevent_cse=False), (queries, mass, mask))
        queries = self.axes.queries
        return jax.tree.map(lambda x: jax.lax.psum(x.sum(), queries) if queries else x.sum(), sums)

    def _chunks(self) -> Queries:
        """The layer's queries, stacked in chunks."""
        inputs, near, window = self.inputs, self.near, self.cfg.sliding_window
        index, entries = inputs.index, inputs.entries
        assert entries is not None and index is not None, "a layer that chooses has both"
        batch, seq, heads = index.q_BSIJ.shape[:3]
        blocks, chunks = chunks_of(batch, seq, window, heads * entries.last_BC.shape[1])
        return cut(
            inputs.q_BSNH,
            near.rows_BYH,
            near.start_B,
            near.position_BY,
            inputs.segment_BS,
            self.segment_BY,
            (index.q_BSIJ, index.w_BSI),
            window,
            blocks,
            chunks,
        )

    def _choose(self, chunk: Queries) -> tuple[jax.Array, jax.Array]:
        """(which entries the queries of a chunk attend to, all index scores), [B,T,C]."""
        entries, index = self.inputs.entries, self.inputs.index
        assert entries is not None and index is not None, "a layer that chooses has both"
        found, score_BTC = choose(self.ctx, self.cfg, self.axes, chunk, entries, index.key_BCJ)
        assert score_BTC is not None, "an indexer has scores"
        return found.mask_BTC, score_BTC
