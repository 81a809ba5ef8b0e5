"""One layer: attention, then experts, each between a collapse of the streams and their expansion.

docs/equations.md#block, report 2, figure 2.

Shapes: B batch, S positions, X streams, D hidden.
Next file to read: v4jax/model/attention.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from v4jax.cache.layer import CacheView
from v4jax.config import LayerGroup, LayerKind, ModelConfig
from v4jax.context import Context
from v4jax.diagnostics import measure, merge
from v4jax.gradient_sums import LAYER, SUMS
from v4jax.model.adapted import DROPOUT
from v4jax.model.attention import Attention
from v4jax.model.hyper import HyperConnection, expanded
from v4jax.model.indexer import IndexLoss
from v4jax.model.moe import MoE
from v4jax.model.norm import RMSNorm
from v4jax.model.router import Routing
from v4jax.model.segments import Segments
from v4jax.model.weights import Weights
from v4jax.parameter_tree import ADAPTERS
from v4jax.remat import ATTENTION, EXPERTS, LAYERS, STREAMS, wrapped


class Block(Weights):
    """One layer: takes streams, gives (streams, routing, cache view, the indexer's loss).

    The view is None without a cache, the loss is None unless an indexer is trained.
    """

    kind: LayerKind

    @nn.compact
    def __call__(
        self,
        x_BSXD: jax.Array,
        tokens_BS: jax.Array,
        segments: Segments,
        view: CacheView | None = None,
    ) -> tuple[jax.Array, Routing, CacheView | None, IndexLoss | None]:
        cfg, ctx = self.cfg, self.ctx
        with jax.named_scope("attention"):
            site = HyperConnection(ctx, cfg, name="hc_attn")(x_BSXD)
            u_BSD = RMSNorm(ctx, cfg, name="attn_norm")(site.u_BSD)
            attention = wrapped(Attention, ATTENTION, ctx.remat)
            y_BSD, view, loss = attention(ctx, cfg, self.kind.compress_ratio, name="attn")(
                u_BSD, segments, view
            )
            x_BSXD = expanded(ctx, y_BSD, site)
            diagnostics = measure(*site[2:], y_BSD, x_BSXD) if ctx.collect.watch else None
        with jax.named_scope("experts"):
            site = HyperConnection(ctx, cfg, name="hc_ffn")(x_BSXD)
            u_BSD = RMSNorm(ctx, cfg, name="ffn_norm")(site.u_BSD)
            experts = wrapped(MoE, EXPERTS, ctx.remat)
            y_BSD, routing = experts(ctx, cfg, self.kind.hash_routed, name="ffn")(
                u_BSD, tokens_BS, segments
            )
            x_BSXD = expanded(ctx, y_BSD, site)
            if diagnostics is not None:
                routing = routing._replace(
                    diagnostics=merge(diagnostics, measure(*site[2:], y_BSD, x_BSXD))
                )
        return x_BSXD, routing, view, loss


class Pattern(Weights):
    """A few layers in order, possibly of different kinds: the unit that `nn.scan` repeats."""

    kinds: tuple[LayerKind, ...]

    @nn.compact
    def __call__(self, carry, tokens_BS, segments: Segments):
        """(carry, three dicts block name -> result).

        They are Routing, IndexLoss where an indexer is trained, and taps [B,S,D] where the context
        collects them.

        carry: (streams, CacheView or None). The view's cache is a dict block name -> LayerCache.
        """
        (x_BSXD, view), routing, cache, index, taps = carry, {}, {}, {}, {}
        x_BSXD = checkpoint_name(x_BSXD, STREAMS)
        for i, kind in enumerate(self.kinds):
            name = f"block_{i}"
            before = None if view is None else view.with_arrays(view.cache[name])
            x_BSXD, routing[name], after, loss = Block(self.ctx, self.cfg, kind, name=name)(
                x_BSXD, tokens_BS, segments, before
            )
            cache[name] = None if after is None else after.cache
            if loss is not None:
                index[name] = loss
            if self.ctx.collect.taps:
                mean_BSD = jnp.mean(x_BSXD.astype(jnp.float32), axis=2)
                taps[name] = mean_BSD.astype(self.ctx.dtype)
        if view is not None:
            view = CacheView(cache, view.layer + 1, view.span)
        return (x_BSXD, view), (routing, index, taps)


def stack(ctx: Context, cfg: ModelConfig, group: LayerGroup) -> nn.Module:
    """A group's Patterns in sequence as one scanned module; weights gain a first axis "layers"."""
    # A loop over two repeats costs more in slicing than it saves in compiling. Models that need
    # remat are large: for them it saves more.
    loop = group.repeats > (2 if ctx.remat == "none" else 1)
    scanned = nn.scan(
        wrapped(Pattern, LAYERS, ctx.remat, in_loop=loop),
        variable_axes={"params": 0, "router": 0, "chosen": 0, ADAPTERS: 0, LAYER: 0},
        variable_carry=SUMS,
        split_rngs={"params": True, DROPOUT: True},
        # Flax takes one for each argument, though its annotation says int.
        in_axes=(nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
        length=group.repeats,
        unroll=1 if loop else group.repeats,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(ctx, cfg, group.kinds, name=group.name)
