"""Manifold-constrained hyper-connections: the residual is several parallel streams, mixed by doubly stochastic matrices.

Everything is float32 (report 2.2, official `hc_pre` / `hc_post` / `hc_split_sinkhorn`).

Shapes: B batch, S positions, X streams (j source, k target), D hidden, M = (2+X)*X mixing weights.
Next file to read: v4jax/model/attention.py.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from v4jax.config import ModelConfig
from v4jax.model.dense import dense
from v4jax.model.weights import Weights, constant

DYNAMIC_SCALE = 0.01
"""Initial gate of the input-dependent part, so that a fresh model starts near its static mix (report 2.2)."""


class Mix(NamedTuple):
    """post [B,S,X] spreads a sublayer's output over streams; comb [B,S,X,X] mixes the old streams (source, target)."""

    post: jax.Array
    comb: jax.Array


def mixing_logits(x_BSXD: jax.Array, fn: jax.Array, eps: float) -> jax.Array:
    """(vec(x) @ fn) * rsqrt(mean(vec(x)^2) + eps), float32 [B,S,M]."""
    x = x_BSXD.astype(jnp.float32).reshape(*x_BSXD.shape[:2], -1)
    return dense(x, fn) * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def sinkhorn(logits_JKT: jax.Array, iterations: int, eps: float) -> jax.Array:
    """Nearly doubly stochastic matrices from logits [source, target, tokens] (tokens last, so that vectors are long).

    softmax over targets + eps, divide by column sums, then iterations-1 times by row sums and by column sums.
    """

    def rows_then_columns(comb, _):
        comb = comb / (comb.sum(axis=1, keepdims=True) + eps)
        return comb / (comb.sum(axis=0, keepdims=True) + eps), None

    comb = jax.nn.softmax(logits_JKT, axis=1) + eps
    comb = comb / (comb.sum(axis=0, keepdims=True) + eps)
    return jax.lax.scan(rows_then_columns, comb, length=iterations - 1)[0]


def collapse(pre_BSX: jax.Array, x_BSXD: jax.Array) -> jax.Array:
    """sum_j pre[j] x[j]: the streams read as one, in the dtype of x."""
    return sum(pre_BSX[..., j, None] * x_BSXD[:, :, j].astype(jnp.float32) for j in range(x_BSXD.shape[2])).astype(x_BSXD.dtype)


@jax.custom_vjp
def expand(y_BSD: jax.Array, x_BSXD: jax.Array, mix: Mix) -> jax.Array:
    """new[k] = post[k] * y + sum_j comb[j,k] * x[j]; comb is consumed transposed (pitfall 1).

    The gradient is written out: what autodiff makes of it takes 2 to 4 times as long on CPU (sums over D one by one).
    """
    return _combine(mix.comb, x_BSXD, mix.post[..., None] * y_BSD[:, :, None].astype(jnp.float32)).astype(x_BSXD.dtype)


def _combine(weight_BSJK: jax.Array, x_BSJD: jax.Array, start=0.0) -> jax.Array:
    """start + sum_j weight[j,k] * x[j], float32 [B,S,K,D], as multiply-adds (a matmul of 4 x 4 per token is slower)."""
    for j in range(x_BSJD.shape[2]):
        start = start + weight_BSJK[:, :, j, :, None] * x_BSJD[:, :, j, None].astype(jnp.float32)
    return start


def _expand_fwd(y_BSD, x_BSXD, mix):
    return expand(y_BSD, x_BSXD, mix), (y_BSD, x_BSXD, mix)


def _expand_bwd(saved, ct_BSKD):
    y_BSD, x_BSXD, mix = saved
    ct = ct_BSKD.astype(jnp.float32)
    ct_y = jnp.sum(mix.post[..., None] * ct, axis=2).astype(y_BSD.dtype)
    ct_x = _combine(jnp.swapaxes(mix.comb, 2, 3), ct).astype(x_BSXD.dtype)
    ct_post = jnp.einsum("BSD,BSKD->BSK", y_BSD.astype(jnp.float32), ct)
    ct_comb = jnp.einsum("BSJD,BSKD->BSJK", x_BSXD.astype(jnp.float32), ct)
    return ct_y, ct_x, Mix(ct_post, ct_comb)


expand.defvjp(_expand_fwd, _expand_bwd)


def _stream_weights(cfg: ModelConfig, x_BSXD, fn, base, scale) -> tuple[jax.Array, Mix]:
    """pre [B,S,X] and Mix from the streams (report 2.2)."""
    n, base = cfg.hc_mult, base[None, None]
    mix = mixing_logits(x_BSXD, fn, cfg.rms_norm_eps)
    pre = jax.nn.sigmoid(mix[..., :n] * scale[0] + base[..., :n]) + cfg.hc_eps
    post = 2 * jax.nn.sigmoid(mix[..., n : 2 * n] * scale[1] + base[..., n : 2 * n])
    logits = mix[..., 2 * n :] * scale[2] + base[..., 2 * n :]
    tokens = logits.shape[:2]
    comb = sinkhorn(logits.reshape(-1, n * n).T.reshape(n, n, -1), cfg.hc_sinkhorn_iters, cfg.hc_eps)
    return pre, Mix(post, comb.reshape(n * n, -1).T.reshape(*tokens, n, n))


class HyperConnection(Weights):
    """One site of mHC: gives the sublayer's input and what is needed to merge its output (`expand`)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BSXD: jax.Array) -> tuple[jax.Array, jax.Array, Mix]:
        """(what the streams collapse to [B,S,D], by which weights [B,S,X], Mix)."""
        n, size = self.cfg.hc_mult, x_BSXD.shape[2] * x_BSXD.shape[3]
        # Static start: read the mean of the streams, write to each, keep them mostly apart.
        static = jnp.concatenate((jnp.full(n, -jnp.log(n - 1.0 + 1e-9)), jnp.zeros(n), 4 * jnp.eye(n).reshape(-1)))
        init = nn.initializers.normal(self.cfg.initializer_range)
        fn = self.weight("fn", (size, (2 + n) * n), ("streams_embed", "mix"), init, True)
        base = self.weight("base", ((2 + n) * n,), ("mix",), constant(static), True)
        scale = self.weight("scale", (3,), (None,), constant(DYNAMIC_SCALE), True)
        pre, mix = _stream_weights(self.cfg, x_BSXD, fn, base, scale)
        return collapse(pre, x_BSXD), pre, mix


class HyperHead(Weights):
    """The last collapse: sigmoid weights only, no mixing."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BSXD: jax.Array) -> jax.Array:
        n, size = self.cfg.hc_mult, x_BSXD.shape[2] * x_BSXD.shape[3]
        init = nn.initializers.normal(self.cfg.initializer_range)
        fn = self.weight("fn", (size, n), ("streams_embed", "mix"), init, True)
        base = self.weight("base", (n,), ("mix",), constant(-jnp.log(n - 1.0 + 1e-9)), True)
        scale = self.weight("scale", (1,), (None,), constant(DYNAMIC_SCALE), True)
        logits = mixing_logits(x_BSXD, fn, self.cfg.rms_norm_eps)
        return collapse(jax.nn.sigmoid(logits * scale[0] + base[None, None]) + self.cfg.hc_eps, x_BSXD)
