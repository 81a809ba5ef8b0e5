"""Diagnostics of a layer: gates and mixing matrices of its hyper-connections, largest activations.

Shapes: B batch, S positions, X streams, J source streams, K target streams, D hidden, M
micro-batches.
Next file to read: v4jax/model/block.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

ITERATIONS = 8
"""Steps of the power method.

A few suffice: comb is nearly doubly stochastic, so the constant vector that they start from is
almost the answer.
"""


class Diagnostics(NamedTuple):
    """Measurements of one sublayer, float32 scalars over all tokens; `merge` joins a layer's two.

    Attributes:
      pre, post: mean gates into and out of the sublayer.
      gate_range: the largest of all these gates minus the smallest.
      comb_norm: largest spectral norm of a mixing matrix (at 1, mixing cannot make the streams
        grow).
      comb_off: mean share of a stream that comes from the others.
      out_max, stream_max: largest absolute value of the sublayer's output, and of the streams after
        it.
      stream_rms: root mean square of the streams after it.
    """

    pre: jax.Array
    post: jax.Array
    gate_range: jax.Array
    comb_norm: jax.Array
    comb_off: jax.Array
    out_max: jax.Array
    stream_max: jax.Array
    stream_rms: jax.Array


def measure(
    pre_BSX: jax.Array,
    post_BSX: jax.Array,
    comb_BSJK: jax.Array,
    y_BSD: jax.Array,
    x_BSXD: jax.Array,
) -> Diagnostics:
    """Measures one sublayer: its gates and mixing matrices, its output y, the streams x after it.

    What pre, post and comb are: docs/equations.md#mhc.
    """
    pre_BSX, post_BSX, comb_BSJK, y_BSD, x_BSXD = jax.lax.stop_gradient(
        (pre_BSX, post_BSX, comb_BSJK, y_BSD, x_BSXD)
    )
    x = x_BSXD.astype(jnp.float32)
    gates = jnp.concatenate((pre_BSX, post_BSX), axis=-1)
    kept = jnp.trace(comb_BSJK, axis1=-2, axis2=-1) / jnp.maximum(comb_BSJK.sum((-2, -1)), 1e-9)
    return Diagnostics(
        pre=pre_BSX.mean(),
        post=post_BSX.mean(),
        gate_range=gates.max() - gates.min(),
        comb_norm=spectral_norm(comb_BSJK).max(),
        comb_off=1 - kept.mean(),
        out_max=jnp.abs(y_BSD.astype(jnp.float32)).max(),
        stream_max=jnp.abs(x).max(),
        stream_rms=jnp.sqrt(jnp.mean(x * x)),
    )


def merge(first: Diagnostics, second: Diagnostics) -> Diagnostics:
    """Joins a layer's two sublayers: means of means, larger of maxima, stream_rms of the second."""
    larger = {
        name: jnp.maximum(getattr(first, name), getattr(second, name))
        for name in ("gate_range", "comb_norm", "out_max", "stream_max")
    }
    means = {
        name: (getattr(first, name) + getattr(second, name)) / 2
        for name in ("pre", "post", "comb_off")
    }
    return second._replace(**larger, **means)


def over_batches(found_M: Diagnostics) -> Diagnostics:
    """Joins micro-batches [M,...] of equally many tokens: means of means, largest of maxima.

    gate_range is the largest of a micro-batch.
    """
    means = {name: getattr(found_M, name).mean(0) for name in ("pre", "post", "comb_off")}
    largest = {
        name: getattr(found_M, name).max(0)
        for name in ("gate_range", "comb_norm", "out_max", "stream_max")
    }
    rms = jnp.sqrt(jnp.mean(found_M.stream_rms**2, axis=0))
    return Diagnostics(**means, **largest, stream_rms=rms)


def spectral_norm(comb_BSJK: jax.Array) -> jax.Array:
    """Largest singular value of each matrix of positive numbers [...,X,X], by the power method.

    The leading vectors of a positive matrix are positive, so a constant start cannot miss them.
    """

    def multiply(v_BSK, _):
        u_BSJ = jnp.sum(comb_BSJK * v_BSK[..., None, :], axis=-1)
        w_BSK = jnp.sum(comb_BSJK * u_BSJ[..., :, None], axis=-2)
        return w_BSK / jnp.maximum(jnp.sqrt(jnp.sum(w_BSK * w_BSK, -1, keepdims=True)), 1e-30), None

    start = jnp.full(comb_BSJK.shape[:-1], comb_BSJK.shape[-1] ** -0.5, comb_BSJK.dtype)
    v_BSK, _ = jax.lax.scan(multiply, start, length=ITERATIONS)
    u_BSJ = jnp.sum(comb_BSJK * v_BSK[..., None, :], axis=-1)
    return jnp.sqrt(jnp.sum(u_BSJ * u_BSJ, axis=-1))
