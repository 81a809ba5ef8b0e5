"""Sinkhorn's iterations: the doubly stochastic matrices that mix the streams of mHC.

Equation: docs/equations.md#mhc.

Shapes: X streams, J source streams, K target streams, T tokens.
Next file to read: v4jax/kernels/streams.py.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp

from sharding.manual import vary_like
from v4jax.kernels.choice import pick


def sinkhorn(
    logits_JKT: jax.Array, iterations: int, eps: float, implementation: str | None = None
) -> jax.Array:
    """Nearly doubly stochastic matrices of logits.

    softmax over targets, plus eps; division by column sums; then iterations-1 times by row sums and
    by column sums. Every sum has eps added.

    Args:
      logits_JKT: float32, tokens last, so that vectors are long.
      iterations: how often columns are divided, at least 1.
      eps: above 0.
      implementation: "reference" or "factors"; None: "factors".

    Returns:
      float32 [J,K,T].

    Raises:
      ValueError: an unknown implementation.
    """
    function = pick("sinkhorn", IMPLEMENTATIONS, implementation, best="factors")
    return function(logits_JKT, iterations, eps)


def reference(logits_JKT: jax.Array, iterations: int, eps: float) -> jax.Array:
    """The divisions as they are written in the equation."""
    comb_JKT = jax.nn.softmax(logits_JKT, axis=1) + eps
    comb_JKT = comb_JKT / (comb_JKT.sum(0, keepdims=True) + eps)
    for _ in range(iterations - 1):
        comb_JKT = comb_JKT / (comb_JKT.sum(1, keepdims=True) + eps)
        comb_JKT = comb_JKT / (comb_JKT.sum(0, keepdims=True) + eps)
    return comb_JKT


def by_factors(logits_JKT: jax.Array, iterations: int, eps: float) -> jax.Array:
    """The divisions gathered in a factor for each row and each column."""
    start_JKT = jax.nn.softmax(logits_JKT, axis=1) + eps
    factors = _factors(start_JKT, iterations, eps)
    row_JT, column_KT = cast(tuple[jax.Array, jax.Array], factors)
    return row_JT[:, None] * start_JKT * column_KT[None]


def unrolled(logits: list[jax.Array], iterations: int, eps: float) -> list[jax.Array]:
    """The same factors without loops, so that it can be differentiated inside a kernel.

    Args:
      logits: float32 [J,T] for each target, tokens last.

    Returns:
      comb [J,T] for each target.
    """
    top_JT = jax.lax.stop_gradient(functools.reduce(jnp.maximum, logits))
    power = [jnp.exp(one_JT - top_JT) for one_JT in logits]
    total_JT = functools.reduce(jnp.add, power)
    start = [one_JT / total_JT + eps for one_JT in power]
    column = [1 / (start_JT.sum(0, keepdims=True) + eps) for start_JT in start]
    row_JT = jnp.ones_like(top_JT)
    for _ in range(iterations - 1):
        products = (s_JT * c_1T for s_JT, c_1T in zip(start, column, strict=True))
        row_JT = row_JT / (row_JT * functools.reduce(jnp.add, products) + eps)
        column = [
            c_1T / (c_1T * (s_JT * row_JT).sum(0, keepdims=True) + eps)
            for s_JT, c_1T in zip(start, column, strict=True)
        ]
    return [row_JT * s_JT * c_1T for s_JT, c_1T in zip(start, column, strict=True)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _factors(start_JKT: jax.Array, iterations: int, eps: float) -> tuple[jax.Array, jax.Array]:
    """(r [J,T], c [K,T]) such that r[j] start[j,k] c[k] is the result of the divisions.

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
    parts = (start_JKT[:, k] * column_KT[k, None] for k in range(column_KT.shape[0]))
    return functools.reduce(jnp.add, parts)


def _column_sums(start_JKT: jax.Array, row_JT: jax.Array) -> jax.Array:
    """sum_j start[j,k] r[j], [K,T], as multiply-adds."""
    parts = (start_JKT[j] * row_JT[j, None] for j in range(row_JT.shape[0]))
    return functools.reduce(jnp.add, parts)


IMPLEMENTATIONS = {"reference": reference, "factors": by_factors}
