"""What all queries of a layer choose, and the indexer's loss, where one kernel attends.

Both are made in chunks of queries. A mask of the layer exists, or a list for each query, and the
mass of its entries, but not its scores by head.

Shapes: B batch, S positions, T query positions of a chunk, Y window keys, N heads, H head dim, C
entries, K chosen entries, I index heads, J index dim.
Next file to read: v4jax/kernels/fused_attention/op.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax.cache.attention_inputs import AttentionInputs, Entries, WindowKV
from v4jax.cache.layer import CompressedKV
from v4jax.cache.sharded import ShardAxes
from v4jax.config import ModelConfig
from v4jax.context import Context
from v4jax.kernels.attention import chunks_of
from v4jax.kernels.index_choice import op as index_choice
from v4jax.kernels.queries import Queries, cut, in_chunks
from v4jax.kernels.tpu import on_tpu
from v4jax.model.entries import choose, chosen_slots, visible_scores
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
        if self._in_kernel():
            return index_choice.mask(self._seekers(), self.cfg.index_topk)
        return self._without_gradient(lambda layer, chunk: layer._choose(chunk)[0])

    def slot_BSK(self) -> jax.Array:
        """The same as a list for each query, int32; -1 for none."""
        if self._in_kernel():
            return index_choice.slot_list(self._seekers(), self.cfg.index_topk)

        def slots(layer: LayerChoice, chunk: Queries) -> jax.Array:
            return chosen_slots(layer.ctx, layer.cfg, layer.axes, chunk, *layer._entries())

        return self._without_gradient(slots)

    def _in_kernel(self) -> bool:
        """Whether one kernel scores and chooses: none of the ops that it replaces is named."""
        kernels = self.ctx.kernels
        named = kernels.index_scores is not None or kernels.top_k not in (None, "pallas_tpu")
        here = on_tpu() or kernels.top_k == "pallas_tpu"
        # Scores of heads on several devices have to be added before the choice.
        whole = self.ctx.rules.shards("index_heads") == 1
        return here and not named and whole and index_choice.unfit(self._seekers()) == ""

    def _seekers(self) -> index_choice.Seekers:
        """What the kernel of the choice reads."""
        inputs, (entries, key_BCJ) = self.inputs, self._entries()
        assert inputs.index is not None and not isinstance(key_BCJ, CompressedKV)
        found = index_choice.Seekers(
            inputs.index.q_BSIJ,
            inputs.index.w_BSI,
            self.near.start_B,
            inputs.segment_BS,
            key_BCJ,
            entries.last_BC,
            entries.segment_BC,
        )
        return jax.lax.stop_gradient(found)

    def _without_gradient(self, of_chunk) -> jax.Array:
        """What a function of (layer, chunk) gives for all queries."""
        layer = self._replace(inputs=jax.lax.stop_gradient(self.inputs))
        batch, seq = self.inputs.q_BSNH.shape[:2]

        def one(chunk: Queries) -> jax.Array:
            found = of_chunk(layer, chunk)
            return jnp.broadcast_to(found, (batch, *found.shape[1:]))

        found = jax.lax.map(one, layer._chunks())
        return jnp.moveaxis(found, 0, 1).reshape(batch, -1, found.shape[-1])[:, :seq]

    def loss(
        self, mass: jax.Array, mask_BSC: jax.Array | None, slot_BSK: jax.Array | None
    ) -> IndexLoss:
        """The loss of all queries (docs/equations.md#indexer-loss).

        Args:
          mass: what all heads give to each entry [B,S,C], or to those of the list [B,S,K].
          mask_BSC: which entries were chosen; None: all that a query sees.
          slot_BSK: the list of chosen entries; None: there is none.
        """
        queries = self._chunks()
        chunks = queries.real_T.shape[0]
        total = queries.real_T.size
        given = jax.tree.map(lambda x: in_chunks(x, chunks, total), (mass, mask_BSC, slot_BSK))

        def one(chunk) -> IndexLoss:
            queries, (mass, mask_BTC, slot_BTK) = chunk
            if slot_BTK is None:
                seen_BTC, score_BTC = self._choose(queries)
                seen_BTC = seen_BTC if mask_BTC is None else mask_BTC
                return index_loss(mass, score_BTC, seen_BTC, queries.real_T)
            _, score_BTC = visible_scores(self.ctx, self.axes, queries, *self._entries())
            score_BTK = jnp.take_along_axis(score_BTC, jnp.maximum(slot_BTK, 0), axis=2)
            return index_loss(mass, score_BTK, slot_BTK >= 0, queries.real_T)

        sums = jax.lax.map(jax.checkpoint(one, prevent_cse=False), (queries, given))
        queries = self.axes.queries
        return jax.tree.map(lambda x: jax.lax.psum(x.sum(), queries) if queries else x.sum(), sums)

    def _chunks(self) -> Queries:
        """The layer's queries, stacked in chunks."""
        inputs, near, window = self.inputs, self.near, self.cfg.sliding_window
        index, (entries, _) = inputs.index, self._entries()
        assert index is not None, "a layer that chooses has one"
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

    def _entries(self) -> tuple[Entries, jax.Array | CompressedKV]:
        """(entries, the indexer's keys)."""
        entries, index = self.inputs.entries, self.inputs.index
        assert entries is not None and index is not None, "a layer that chooses has both"
        return entries, index.key_BCJ

    def _choose(self, chunk: Queries) -> tuple[jax.Array, jax.Array]:
        """(which entries the queries of a chunk attend to, all index scores), [B,T,C]."""
        found, score_BTC = choose(self.ctx, self.cfg, self.axes, chunk, *self._entries())
        assert score_BTC is not None, "an indexer has scores"
        return found.mask_BTC, score_BTC
