"""Collapse and expansion of the residual streams of mHC.

Equation: docs/equations.md#mhc.

Shapes: B batch, S positions, X streams, J source streams, K target streams, D hidden.
Next file to read: v4jax/kernels/hyper_connection/op.py.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax.kernels.choice import pick
from v4jax.kernels.matmul import precision_of


class Streams(NamedTuple):
    """One implementation: both directions."""

    collapse: Callable[..., jax.Array]
    expand: Callable[..., jax.Array]


def collapse(pre_BSX: jax.Array, x_BSXD: jax.Array, implementation: str | None = None) -> jax.Array:
    """sum_j pre[j] x[j]: all streams as one.

    Args:
      pre_BSX: float32, each stream's weight.
      x_BSXD: streams.
      implementation: "reference" or "multiply_adds"; None: "multiply_adds".

    Returns:
      [B,S,D] in the dtype of x; sums are float32.

    Raises:
      ValueError: an unknown implementation.
    """
    chosen = pick("streams", IMPLEMENTATIONS, implementation, best="multiply_adds")
    return chosen.collapse(pre_BSX, x_BSXD)


def expand(
    y_BSD: jax.Array,
    x_BSXD: jax.Array,
    post_BSX: jax.Array,
    comb_BSXX: jax.Array,
    implementation: str | None = None,
) -> jax.Array:
    """New streams: new[k] = post[k] * y + sum_j comb[j,k] * x[j].

    comb is consumed transposed (docs/equations.md#trap-1).

    Args:
      y_BSD: a sublayer's output.
      x_BSXD: the old streams.
      post_BSX: float32, the output's weight in each stream.
      comb_BSXX: float32, mixes the old streams (source, target).
      implementation: "reference" or "multiply_adds"; None: "multiply_adds".

    Returns:
      [B,S,X,D] in the dtype of x; sums are float32.

    Raises:
      ValueError: an unknown implementation.
    """
    chosen = pick("streams", IMPLEMENTATIONS, implementation, best="multiply_adds")
    return chosen.expand(y_BSD, x_BSXD, post_BSX, comb_BSXX)


def _collapse_reference(pre_BSX, x_BSXD):
    x = x_BSXD.astype(jnp.float32)
    return _einsum("BSX,BSXD->BSD", pre_BSX, x).astype(x_BSXD.dtype)


def _expand_reference(y_BSD, x_BSXD, post_BSX, comb_BSXX):
    y, x = y_BSD.astype(jnp.float32), x_BSXD.astype(jnp.float32)
    new_BSXD = post_BSX[..., None] * y[:, :, None] + _einsum("BSJK,BSJD->BSKD", comb_BSXX, x)
    return new_BSXD.astype(x_BSXD.dtype)


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, precision=precision_of(a))


@jax.custom_vjp
def _collapse(pre_BSX: jax.Array, x_BSXD: jax.Array) -> jax.Array:
    """`collapse`; the gradient is written out for the reason given in `_expand`."""
    return _weighted(pre_BSX, x_BSXD).astype(x_BSXD.dtype)


def _weighted(weight_BSX: jax.Array, x_BSXD: jax.Array) -> jax.Array:
    """sum_j weight[j] * x[j] as multiply-adds, float32 [B,S,D]."""
    parts = (
        weight_BSX[..., j, None] * x_BSXD[:, :, j].astype(jnp.float32)
        for j in range(x_BSXD.shape[2])
    )
    return functools.reduce(jnp.add, parts)


def _collapse_fwd(pre_BSX, x_BSXD):
    return _collapse(pre_BSX, x_BSXD), (pre_BSX, x_BSXD)


def _collapse_bwd(saved, ct_BSD):
    pre_BSX, x_BSXD = saved
    ct = ct_BSD.astype(jnp.float32)
    ct_pre = _einsum("BSD,BSXD->BSX", ct, x_BSXD.astype(jnp.float32))
    return ct_pre, (pre_BSX[..., None] * ct[:, :, None]).astype(x_BSXD.dtype)


_collapse.defvjp(_collapse_fwd, _collapse_bwd)


@jax.custom_vjp
def _expand(y_BSD, x_BSXD, post_BSX, comb_BSXX) -> jax.Array:
    """`expand`, whose gradient is written out.

    XLA:CPU is slow at what autodiff makes of it: sums over D, one number at a time.
    """
    return _combine(
        comb_BSXX, x_BSXD, post_BSX[..., None] * y_BSD[:, :, None].astype(jnp.float32)
    ).astype(x_BSXD.dtype)


def _combine(weight_BSJK: jax.Array, x_BSJD: jax.Array, *start: jax.Array) -> jax.Array:
    """start + sum_j weight[j,k] * x[j], float32 [B,S,K,D].

    Written as multiply-adds, since an X x X matmul per token is slower.
    """
    parts = (
        weight_BSJK[:, :, j, :, None] * x_BSJD[:, :, j, None].astype(jnp.float32)
        for j in range(x_BSJD.shape[2])
    )
    return functools.reduce(jnp.add, (*start, *parts))


def _expand_fwd(y_BSD, x_BSXD, post_BSX, comb_BSXX):
    saved = (y_BSD, x_BSXD, post_BSX, comb_BSXX)
    return _expand(*saved), saved


def _expand_bwd(saved, ct_BSKD):
    y_BSD, x_BSXD, post_BSX, comb_BSXX = saved
    ct = ct_BSKD.astype(jnp.float32)
    # For a sum over an axis XLA:CPU would keep post, repeated D times, from the forward pass.
    ct_y = _weighted(post_BSX, ct).astype(y_BSD.dtype)
    ct_x = _combine(jnp.swapaxes(comb_BSXX, 2, 3), ct).astype(x_BSXD.dtype)
    ct_post = _einsum("BSD,BSKD->BSK", y_BSD.astype(jnp.float32), ct)
    ct_comb = _einsum("BSJD,BSKD->BSJK", x_BSXD.astype(jnp.float32), ct)
    return ct_y, ct_x, ct_post, ct_comb


_expand.defvjp(_expand_fwd, _expand_bwd)


IMPLEMENTATIONS = {
    "reference": Streams(_collapse_reference, _expand_reference),
    "multiply_adds": Streams(_collapse, _expand),
}
