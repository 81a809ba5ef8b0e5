"""Manifold-constrained hyper-connections (mHC): parallel residual streams that a matrix mixes.

A site collapses the streams to a sublayer's input and expands its output to all streams, which a
doubly stochastic matrix mixes. Everything is float32 (docs/equations.md#mhc, report 2.2, official
`hc_pre`, `hc_post`, `hc_split_sinkhorn`).

Shapes: B batch, S positions, X streams, D hidden, T tokens, P logits of a matrix (X*X), M mixing
weights ((2+X)*X); lower case = this device's share.
Next file to read: sharding/rules.py.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from sharding.manual import on_own_tokens
from sharding.rules import AxisRules
from v4jax.config import ModelConfig
from v4jax.context import Context
from v4jax.kernels.choice import Kernels
from v4jax.kernels.hyper_connection.blocks import Site
from v4jax.kernels.hyper_connection.op import IMPLEMENTATIONS, SiteResult, in_kernels
from v4jax.kernels.matmul import dense
from v4jax.kernels.norm import over_rms
from v4jax.kernels.sinkhorn import sinkhorn
from v4jax.kernels.streams import collapse, expand
from v4jax.kernels.tpu import on_tpu
from v4jax.model.weights import Weights


def mixing_logits(
    x_BSXD: jax.Array, fn: jax.Array, eps: float, kernels: Kernels = Kernels()
) -> jax.Array:
    """(vec(x) @ fn) * rsqrt(mean(vec(x)^2) + eps), float32 [B,S,M].

    The gradient at streams of zeros is that of RMS 1 (`over_rms`).
    """
    x = x_BSXD.astype(jnp.float32).reshape(*x_BSXD.shape[:2], -1)
    logits = dense(x, fn, implementation=kernels.matmul)
    return over_rms(logits, jnp.mean(x * x, axis=-1, keepdims=True), eps)


def balanced(
    rules: AxisRules,
    iterations: int,
    eps: float,
    logits_BSP: jax.Array,
    implementation: str | None = None,
) -> jax.Array:
    """comb of every token [B,S,X,X]: `sinkhorn` of its P = X*X logits."""

    def local(logits_bsP):
        n, tokens = math.isqrt(logits_bsP.shape[-1]), logits_bsP.shape[:2]
        logits_XXT = logits_bsP.reshape(-1, n * n).T.reshape(n, n, -1)
        comb = sinkhorn(logits_XXT, iterations, eps, implementation)
        return comb.reshape(n * n, -1).T.reshape(*tokens, n, n)

    return on_own_tokens(rules, local, logits_BSP)


def collapsed(ctx: Context, cfg: ModelConfig, x_BSXD, fn, base, scale) -> SiteResult:
    """The collapsed streams, and the weights that made them and will expand them again."""
    inputs = (x_BSXD, fn, base, scale)
    if in_kernels(ctx.kernels, x_BSXD):
        eps = (cfg.rms_norm_eps, cfg.hc_eps)
        site = Site(cfg.hc_mult, cfg.hc_sinkhorn_iters, *eps, interpret=not on_tpu())
        return IMPLEMENTATIONS["pallas_tpu"].site(ctx.rules, site, *inputs)
    return IMPLEMENTATIONS["reference"].site(_composed, ctx, cfg, *inputs)


def _composed(ctx: Context, cfg: ModelConfig, x_BSXD, fn, base, scale) -> SiteResult:
    """pre, post and comb of the streams, and the collapse (docs/equations.md#mhc)."""
    n, base = cfg.hc_mult, base[None, None]
    mix = mixing_logits(x_BSXD, fn, cfg.rms_norm_eps, ctx.kernels)
    pre = jax.nn.sigmoid(mix[..., :n] * scale[0] + base[..., :n]) + cfg.hc_eps
    post = 2 * jax.nn.sigmoid(mix[..., n : 2 * n] * scale[1] + base[..., n : 2 * n])
    logits = mix[..., 2 * n :] * scale[2] + base[..., 2 * n :]
    comb = balanced(ctx.rules, cfg.hc_sinkhorn_iters, cfg.hc_eps, logits, ctx.kernels.sinkhorn)
    u_BSD = collapse(pre, x_BSXD, ctx.kernels.streams)
    return SiteResult(x_BSXD, u_BSD, pre, post, comb)


def expanded(ctx: Context, y_BSD: jax.Array, site: SiteResult) -> jax.Array:
    """New streams [B,S,X,D] of a sublayer's output and the old streams."""
    inputs = (y_BSD, site.x_BSXD, site.post_BSX, site.comb_BSXX)
    if in_kernels(ctx.kernels, site.x_BSXD):
        x_BSXD = IMPLEMENTATIONS["pallas_tpu"].expand(ctx.rules, *inputs)
    else:
        x_BSXD = IMPLEMENTATIONS["reference"].expand(expand, *inputs, ctx.kernels.streams)
    return ctx.rules.constrain(x_BSXD, "act_batch", "act_seq", "act_streams", "act_embed")


class HyperConnection(Weights):
    """One site of mHC: makes a sublayer's input, and the weights that merge its output."""

    @nn.compact
    def __call__(self, x_BSXD: jax.Array) -> SiteResult:
        """What `expanded` takes beside the sublayer's output."""
        fn = self.weight("fn")
        base = self.weight("base")
        scale = self.weight("scale")
        return collapsed(self.ctx, self.cfg, x_BSXD, fn, base, scale)


class HyperHead(Weights):
    """The last collapse of the streams: sigmoid weights, no mixing."""

    @nn.compact
    def __call__(self, x_BSXD: jax.Array) -> jax.Array:
        fn = self.weight("fn")
        base = self.weight("base")
        scale = self.weight("scale")
        logits = mixing_logits(x_BSXD, fn, self.cfg.rms_norm_eps, self.ctx.kernels)
        pre = jax.nn.sigmoid(logits * scale[0] + base[None, None]) + self.cfg.hc_eps
        return collapse(pre, x_BSXD, self.ctx.kernels.streams)
