"""Multi-token prediction: one more block predicts token t+2 from the streams at t and token t+1.

Shapes: B batch, S positions, X streams, D hidden.
Next file to read: v4jax/model/block.py.
"""

from typing import Any

import flax.linen as nn
import jax

from v4jax.cache.layer import CacheView
from v4jax.config import ModelConfig
from v4jax.context import Context
from v4jax.gradient_sums import SUMS
from v4jax.model.adapted import DROPOUT
from v4jax.model.block import Block
from v4jax.model.hyper import HyperHead
from v4jax.model.norm import RMSNorm
from v4jax.model.router import Routing
from v4jax.model.segments import Segments
from v4jax.model.weights import Weights
from v4jax.parameter_tree import ADAPTERS, MTP_KIND
from v4jax.remat import LAYERS, wrapped


class MTP(Weights):
    """Streams at t and the embedding of token t+1 -> final state that predicts token t+2.

        x = block(e_proj(enorm(next)) copied to every stream + h_proj(hnorm(streams)))

    A collapse and a norm of MTP's own follow (docs/equations.md#mtp).
    """

    @nn.compact
    def __call__(
        self,
        x_BSXD: jax.Array,
        next_BSD: jax.Array,
        next_BS: jax.Array,
        segments: Segments,
        view: CacheView | None = None,
    ) -> tuple[jax.Array, Routing, CacheView | None]:
        """(final state [B,S,D], Routing, cache view or None).

        Args:
          x_BSXD: streams of the main model before its last collapse.
          next_BSD, next_BS: embeddings and ids of the tokens that follow.
        """
        cfg, ctx = self.cfg, self.ctx
        e_proj = self.matrix("e_proj")
        h_proj = self.matrix("h_proj")
        e_BSD = RMSNorm(ctx, cfg, name="enorm")(next_BSD)
        h_BSXD = RMSNorm(ctx, cfg, name="hnorm")(x_BSXD)
        next_BSD = self.dense(self.act_quant(e_BSD), e_proj)
        x_BSXD = next_BSD[:, :, None] + self.dense(self.act_quant(h_BSXD), h_proj)
        x_BSXD, routing, view, _ = Block(ctx, cfg, MTP_KIND, name="block")(
            x_BSXD, next_BS, segments, view
        )
        x_BSD = HyperHead(ctx, cfg, name="hc_head")(x_BSXD)
        return RMSNorm(ctx, cfg, name="norm")(x_BSD), routing, view


class Drafter(Weights):
    """MTP alone, under the name that it has in the tree: decoding runs it apart from the layers."""

    @nn.compact
    def __call__(self, *inputs) -> tuple[jax.Array, Routing, CacheView | None]:
        """What MTP returns for these inputs."""
        return MTP(self.ctx, self.cfg, name="mtp")(*inputs)


def run_mtp(ctx: Context, cfg: ModelConfig, variables, key, x_BSXD: jax.Array, *others):
    """(what MTP returns, sums of gradients), with weight gradients that are ready in time.

    XLA delays work that only the optimizer waits for: whole gradients of MTP's experts, not yet
    scattered over devices, would lie in memory all through the backward pass of the layers.

    Args:
      variables: collection -> {"mtp": its variables}.
      key: of dropped inputs (v4jax/model/adapted.py), or None.
      x_BSXD, others: inputs of MTP.
    """
    learns = (ADAPTERS,) if ctx.frozen else ("params", SUMS)
    trained = {name: variables[name] for name in learns if name in variables}
    x_BSXD, trained = _ready_together(x_BSXD, trained)
    drafter = wrapped(Drafter, LAYERS, ctx.remat)(ctx, cfg)
    keys = {} if key is None else {DROPOUT: key}
    found: Any = drafter.apply(dict(variables) | trained, x_BSXD, *others, mutable=SUMS, rngs=keys)
    results, changed = found
    return results, changed.get(SUMS, {}).get("mtp")


@jax.custom_vjp
def _ready_together(*trees):
    """The trees as they are; the backward pass continues once it has the gradients of all."""
    return trees


_ready_together.defvjp(
    lambda *trees: (trees, None), lambda _, cotangents: jax.lax.optimization_barrier(cotangents)
)
