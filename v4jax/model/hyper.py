"""Manifold-constrained hyper-connections (mHC): parallel residual streams that a matrix mixes.

A site collapses the streams to a sublayer's input and expands its output to all streams, which a
doubly stochastic matrix mixes. Everything is float32 (docs/equations.md#mhc, report 2.2, official
`hc_pre`, `hc_post`, `hc_split_sinkhorn`).

Shapes: B batch, S positions, T tokens, X streams (J source, K target), D hidden, P = X*X logits of
a matrix, M = (2+X)*X mixing weights; lower case = this device's share.
Next file to read: sharding/rules.py.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sharding.manual import vary_like
from sharding.rules import AxisRules
from v4jax.config import ModelConfig
from v4jax.kernels.matmul import dense, precision_of
from v4jax.model.weights import Weights


class Mix(NamedTuple):
    """The weights by which a sublayer's output and the old streams make the new streams.

    Attributes:
      post: float32 [B,S,X], the output's weight in each stream.
      comb: float32 [B,S,X,X], mixes the old streams (source, target).
    """

    post: jax.Array
    comb: jax.Array


def mixing_logits(x_BSXD: jax.Array, fn: jax.Array, eps: float) -> jax.Array:
    """(vec(x) @ fn) * rsqrt(mean(vec(x)^2) + eps), float32 [B,S,M]."""
    x = x_BSXD.astype(jnp.float32).reshape(*x_BSXD.shape[:2], -1)
    return dense(x, fn) * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def sinkhorn(logits_JKT: jax.Array, iterations: int, eps: float) -> jax.Array:
    """Nearly doubly stochastic matrices [J,K,T] from logits of the same shape, with tokens last.

    softmax over targets, plus eps; division by column sums; then iterations-1 times by row sums and
    by column sums. Every sum has eps added. Tokens are the last axis so that vectors are long.
    """
    start_JKT = jax.nn.softmax(logits_JKT, axis=1) + eps
    row_JT, column_KT = _factors(start_JKT, iterations, eps)
    return row_JT[:, None] * start_JKT * column_KT[None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _factors(start_JKT: jax.Array, iterations: int, eps: float) -> tuple[jax.Array, jax.Array]:
    """(r [J,T], c [K,T]) such that r[j] start[j,k] c[k] is the result of `sinkhorn`'s divisions.

    Dividing rows by their sums + eps is r[j] = r[j] / (r[j] sum_k start[j,k] c[k] + eps). So an
    iteration writes 2 X numbers per token instead of 2 X X, and the gradient keeps no more.
    """
    return _factors_fwd(start_JKT, iterations, eps)[0]


def _factors_fwd(start_JKT, iterations, eps):
    def rows_then_columns(before, _):
        row_JT, column_KT = before
        row_JT = row_JT / (row_JT * _row_sums(start_JKT, column_KT) + eps)
        return (row_JT, column_KT / (column_KT * _column_sums(start_JKT, row_JT) + eps)), before

    ones_JT = vary_like(jnp.ones_like(start_JKT[:, 0]), start_JKT)
    last, before = jax.lax.scan(
        rows_then_columns,
        (ones_JT, 1 / (_column_sums(start_JKT, ones_JT) + eps)),
        length=iterations - 1,
    )
    return last, (start_JKT, last, before)


def _factors_bwd(iterations, eps, saved, ct):
    """Gradient of `_factors`: y = x / (x s + eps) has dy/ds = -y^2 and dy/dx = eps (y/x)^2."""
    start_JKT, last, before = saved

    def undo(carry, before):
        (ct_row, ct_column), ct_start, (row_JT, column_KT) = carry
        row_before, column_before = before
        ct_column_sum = -ct_column * column_KT * column_KT
        ct_row = ct_row + _row_sums(start_JKT, ct_column_sum)
        ct_row_sum = -ct_row * row_JT * row_JT
        ct_column = eps * ct_column * (column_KT / column_before) ** 2 + _column_sums(
            start_JKT, ct_row_sum
        )
        ct_row = eps * ct_row * (row_JT / row_before) ** 2
        ct_start = (
            ct_start
            + row_JT[:, None] * ct_column_sum[None]
            + ct_row_sum[:, None] * column_before[None]
        )
        return ((ct_row, ct_column), ct_start, before), None

    carry = (ct, vary_like(jnp.zeros_like(start_JKT), start_JKT), last)
    ((_, ct_column), ct_start, (_, column_KT)), _ = jax.lax.scan(undo, carry, before, reverse=True)
    return (ct_start - (ct_column * column_KT * column_KT)[None],)


_factors.defvjp(_factors_fwd, _factors_bwd)


def _row_sums(start_JKT: jax.Array, column_KT: jax.Array) -> jax.Array:
    """sum_k start[j,k] c[k], [J,T], as multiply-adds."""
    return sum(start_JKT[:, k] * column_KT[k, None] for k in range(column_KT.shape[0]))


def _column_sums(start_JKT: jax.Array, row_JT: jax.Array) -> jax.Array:
    """sum_j start[j,k] r[j], [K,T], as multiply-adds."""
    return sum(start_JKT[j] * row_JT[j, None] for j in range(row_JT.shape[0]))


@jax.custom_vjp
def collapse(pre_BSX: jax.Array, x_BSXD: jax.Array) -> jax.Array:
    """sum_j pre[j] x[j], [B,S,D] in the dtype of x: all streams as one.

    The gradient is written out for the reason given in `expand`.
    """
    return sum(
        pre_BSX[..., j, None] * x_BSXD[:, :, j].astype(jnp.float32) for j in range(x_BSXD.shape[2])
    ).astype(x_BSXD.dtype)


def _collapse_fwd(pre_BSX, x_BSXD):
    return collapse(pre_BSX, x_BSXD), (pre_BSX, x_BSXD)


def _collapse_bwd(saved, ct_BSD):
    pre_BSX, x_BSXD = saved
    ct = ct_BSD.astype(jnp.float32)
    ct_pre = jnp.einsum("BSD,BSXD->BSX", ct, x_BSXD.astype(jnp.float32), precision=precision_of(ct))
    return ct_pre, (pre_BSX[..., None] * ct[:, :, None]).astype(x_BSXD.dtype)


collapse.defvjp(_collapse_fwd, _collapse_bwd)


@jax.custom_vjp
def expand(y_BSD: jax.Array, x_BSXD: jax.Array, mix: Mix) -> jax.Array:
    """New streams: new[k] = post[k] * y + sum_j comb[j,k] * x[j], [B,S,X,D] in the dtype of x.

    comb is consumed transposed (docs/equations.md#trap-1). The gradient is written out because
    XLA:CPU is slow at what autodiff makes of it: sums over D, one number at a time.
    """
    return _combine(
        mix.comb, x_BSXD, mix.post[..., None] * y_BSD[:, :, None].astype(jnp.float32)
    ).astype(x_BSXD.dtype)


def _combine(weight_BSJK: jax.Array, x_BSJD: jax.Array, start=0.0) -> jax.Array:
    """start + sum_j weight[j,k] * x[j], float32 [B,S,K,D].

    Written as multiply-adds, since an X x X matmul per token is slower.
    """
    for j in range(x_BSJD.shape[2]):
        start = start + weight_BSJK[:, :, j, :, None] * x_BSJD[:, :, j, None].astype(jnp.float32)
    return start


def _expand_fwd(y_BSD, x_BSXD, mix):
    return expand(y_BSD, x_BSXD, mix), (y_BSD, x_BSXD, mix)


def _expand_bwd(saved, ct_BSKD):
    y_BSD, x_BSXD, mix = saved
    ct = ct_BSKD.astype(jnp.float32)
    # For a sum over an axis XLA:CPU would keep post, repeated D times, from the forward pass.
    ct_y = sum(mix.post[..., k, None] * ct[:, :, k] for k in range(ct.shape[2])).astype(y_BSD.dtype)
    ct_x = _combine(jnp.swapaxes(mix.comb, 2, 3), ct).astype(x_BSXD.dtype)
    ct_post = jnp.einsum("BSD,BSKD->BSK", y_BSD.astype(jnp.float32), ct, precision=precision_of(ct))
    ct_comb = jnp.einsum(
        "BSJD,BSKD->BSJK", x_BSXD.astype(jnp.float32), ct, precision=precision_of(ct)
    )
    return ct_y, ct_x, Mix(ct_post, ct_comb)


expand.defvjp(_expand_fwd, _expand_bwd)


def balanced(rules: AxisRules, iterations: int, eps: float, logits_BSP: jax.Array) -> jax.Array:
    """comb of every token [B,S,X,X]: `sinkhorn` of its P = X*X logits."""

    def local(logits_bsP):
        n, tokens = math.isqrt(logits_bsP.shape[-1]), logits_bsP.shape[:2]
        comb = sinkhorn(logits_bsP.reshape(-1, n * n).T.reshape(n, n, -1), iterations, eps)
        return comb.reshape(n * n, -1).T.reshape(*tokens, n, n)

    if not rules:
        return local(logits_BSP)
    # Each device balances its own tokens. Where batch and sequence are cut, XLA would gather all
    # tokens on every device to merge B and S.
    spec = rules.spec(("act_batch", "act_seq"))
    return jax.shard_map(local, in_specs=spec, out_specs=spec)(logits_BSP)


def _stream_weights(
    rules: AxisRules, cfg: ModelConfig, x_BSXD, fn, base, scale
) -> tuple[jax.Array, Mix]:
    """(pre [B,S,X], Mix) of the streams (docs/equations.md#mhc)."""
    n, base = cfg.hc_mult, base[None, None]
    mix = mixing_logits(x_BSXD, fn, cfg.rms_norm_eps)
    pre = jax.nn.sigmoid(mix[..., :n] * scale[0] + base[..., :n]) + cfg.hc_eps
    post = 2 * jax.nn.sigmoid(mix[..., n : 2 * n] * scale[1] + base[..., n : 2 * n])
    logits = mix[..., 2 * n :] * scale[2] + base[..., 2 * n :]
    return pre, Mix(post, balanced(rules, cfg.hc_sinkhorn_iters, cfg.hc_eps, logits))


class HyperConnection(Weights):
    """One site of mHC: makes a sublayer's input, and the weights that merge its output."""

    @nn.compact
    def __call__(self, x_BSXD: jax.Array) -> tuple[jax.Array, jax.Array, Mix]:
        """(collapsed streams [B,S,D], their weights pre [B,S,X], Mix)."""
        fn = self.weight("fn")
        base = self.weight("base")
        scale = self.weight("scale")
        pre, mix = _stream_weights(self.ctx.rules, self.cfg, x_BSXD, fn, base, scale)
        return collapse(pre, x_BSXD), pre, mix


class HyperHead(Weights):
    """The last collapse of the streams: sigmoid weights, no mixing."""

    @nn.compact
    def __call__(self, x_BSXD: jax.Array) -> jax.Array:
        fn = self.weight("fn")
        base = self.weight("base")
        scale = self.weight("scale")
        logits = mixing_logits(x_BSXD, fn, self.cfg.rms_norm_eps)
        return collapse(
            jax.nn.sigmoid(logits * scale[0] + base[None, None]) + self.cfg.hc_eps, x_BSXD
        )
