"""The network from token ids to final states: embedding, residual streams, layers, collapse, norm.

Training and decoding run the same module. Whole rows come without a cache; chunks that continue
rows come with one.

Shapes: B batch, S positions, X streams, D hidden, V vocabulary.
Next file to read: v4jax/model/block.py.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sharding.embedding import embed_lookup
from v4jax.cache.layer import CacheView
from v4jax.config import LayerGroup
from v4jax.context import Context
from v4jax.gradient_sums import SUMS
from v4jax.model.adapted import DROPOUT, Weight, product
from v4jax.model.block import Pattern, stack
from v4jax.model.hyper import HyperHead
from v4jax.model.indexer import IndexLoss
from v4jax.model.mtp import MTP, run_mtp
from v4jax.model.norm import RMSNorm
from v4jax.model.router import Routing
from v4jax.model.segments import Segments, without_last_tokens
from v4jax.model.weights import Weights


class Hidden(NamedTuple):
    """Results of the network before the head.

    Attributes:
      x_BSD: normalised final state; x @ head gives the logits of the next token.
      mtp_x_BSD: the same for the token after the next; None without MTP and where rows are
        continued. It is meaningless at a document's last position.
      head_DV: the head in the compute dtype, so that a loss can apply it piece by piece; it may
        have a low-rank pair.
      streams_BSXD: residual streams before their last collapse.
      routing: group name -> block name -> Routing with a first axis for layers; "mtp" -> "block" ->
        Routing.
      index: group name -> block name -> IndexLoss with a first axis for layers, where the indexer
        is trained.
      cache: group name -> block name -> LayerCache with this chunk; None without a cache.
      taps: group name -> block name -> means of the streams after each layer, [L,B,S,D], where the
        context collects them.
      sums: what came in as sums of gradients (v4jax/gradient_sums.py); None without them.
    """

    x_BSD: jax.Array
    mtp_x_BSD: jax.Array | None
    head_DV: Weight
    streams_BSXD: jax.Array
    routing: dict[str, dict[str, Routing]]
    index: dict[str, dict[str, IndexLoss]]
    cache: dict[str, Any] | None
    taps: dict[str, dict[str, jax.Array]]
    sums: Any = None


class Transformer(Weights):
    """The network up to the head; declares every weight."""

    @nn.compact
    def __call__(
        self, tokens_BS: jax.Array, segments: Segments, view: CacheView | None = None
    ) -> Hidden:
        """Runs whole rows, or with `view` chunks that continue rows.

        view: its cache is a dict group name -> block name -> LayerCache.
        """
        cfg, ctx = self.cfg, self.ctx
        table_VD = Embedding(ctx, cfg, name="embed")()
        head_DV = Head(ctx, cfg, name="head")()
        with jax.named_scope("embed"):
            x_BSD = embed_lookup(ctx.rules, table_VD, tokens_BS).astype(ctx.dtype)
        x_BSXD = jnp.broadcast_to(
            x_BSD[:, :, None], (*x_BSD.shape[:2], cfg.hc_mult, cfg.hidden_size)
        )
        x_BSXD = ctx.rules.constrain(x_BSXD, "act_batch", "act_seq", "act_streams", "act_embed")
        routing, index, taps, cache = {}, {}, {}, {}
        for group in cfg.layer_groups:
            before = None
            if view is not None:
                before = CacheView(view.cache[group.name], jnp.int32(0), view.span)
            (x_BSXD, after), results = self._group(group, (x_BSXD, before), tokens_BS, segments)
            routing[group.name], index[group.name], taps[group.name] = results
            cache[group.name] = None if after is None else after.cache
        mtp_x_BSD = None
        if cfg.num_nextn_predict_layers and view is None:
            mtp_x_BSD, route = self._mtp(table_VD, x_BSXD, tokens_BS, segments)
            routing["mtp"] = {"block": route}
        x_BSD = HyperHead(ctx, cfg, name="hc_head")(x_BSXD)
        x_BSD = RMSNorm(ctx, cfg, name="norm")(x_BSD)
        cache = None if view is None else cache
        return Hidden(x_BSD, mtp_x_BSD, head_DV, x_BSXD, routing, index, cache, taps)

    def _group(self, group: LayerGroup, carry, tokens_BS, segments: Segments):
        """(carry, results) after a group of layers, as Pattern returns them for one repetition.

        The group is one scan, or one Pattern after another where the parameters come layer by layer
        (`split_layers` in v4jax/generate/cache.py).
        """
        if not self.has_variable("params", group.layer(0)):
            return stack(self.ctx, self.cfg, group)(carry, tokens_BS, segments)
        results = []
        for n in range(group.repeats):
            pattern = Pattern(self.ctx, self.cfg, group.kinds, name=group.layer(n))
            carry, result = pattern(carry, tokens_BS, segments)
            results.append(result)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *results)

    def _mtp(self, table_VD, x_BSXD, tokens_BS, segments: Segments) -> tuple[jax.Array, Routing]:
        """(final state that predicts the token after the next [B,S,D], Routing)."""
        with jax.named_scope("mtp"):
            next_BS = jnp.pad(tokens_BS[:, 1:], ((0, 0), (0, 1)))
            next_BSD = embed_lookup(self.ctx.rules, table_VD, next_BS).astype(self.ctx.dtype)
            counted = without_last_tokens(segments, next_BS)
            inputs = (x_BSXD, next_BSD, next_BS, counted)
            if self.is_initializing():
                return MTP(self.ctx, self.cfg, name="mtp")(*inputs)[:2]
            variables = {
                name: {"mtp": found["mtp"]}
                for name, found in self.variables.items()
                if "mtp" in found
            }
            key = self.make_rng(DROPOUT) if self.ctx.dropout > 0 else None
            results, sums = run_mtp(self.ctx, self.cfg, variables, key, *inputs)
            if sums is not None:
                self.put_variable(SUMS, "mtp", sums)
            return results[:2]


class Embedding(Weights):
    """The token table, cut as the layout says, because `embed_lookup` needs no whole table."""

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.stored("weight")


class Head(Weights):
    """The output matrix, which is not tied to the embedding."""

    @nn.compact
    def __call__(self) -> Weight:
        return self.matrix("weight")


def project_logits(ctx: Context, x_BSD: jax.Array, head_DV: Weight) -> jax.Array:
    """Logits x @ head, float32 [B,S,V]."""
    logits = product(ctx, x_BSD, head_DV, jnp.float32)
    return ctx.rules.constrain(logits, "act_batch", "act_seq", "act_vocab")
