"""How a layer is doing, in a few numbers: gates and mixing matrices of its hyper-connections, largest activations.

Shapes: B batch, S positions, X streams (j source, k target), D hidden.
Next file to read: v4jax/model/block.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from v4jax.model.hyper import Mix

ITERATIONS = 8
"""Of the power method: Sinkhorn leaves comb so near to doubly stochastic that the ones it starts from are almost the answer."""


class Diagnostics(NamedTuple):
    """Float32 scalars of one sublayer, over all tokens of the batch; `merge` joins the two of a layer.

    Attributes:
      pre, post: mean gates into and out of the sublayer. gate_range: largest minus smallest of all of them.
      comb_norm: largest spectral norm of a mixing matrix (1: mixing cannot make the streams grow).
      comb_off: mean share of a stream that comes from the others.
      out_max, stream_max: largest absolute value of the sublayer's output and of the streams behind it.
      stream_rms: root mean square of the streams.
    """

    pre: jax.Array
    post: jax.Array
    gate_range: jax.Array
    comb_norm: jax.Array
    comb_off: jax.Array
    out_max: jax.Array
    stream_max: jax.Array
    stream_rms: jax.Array


def measure(pre_BSX: jax.Array, mix: Mix, y_BSD: jax.Array, x_BSXD: jax.Array) -> Diagnostics:
    """The numbers of one sublayer: its gates, its output y, the streams x behind it."""
    pre_BSX, mix, y_BSD, x_BSXD = jax.lax.stop_gradient((pre_BSX, mix, y_BSD, x_BSXD))
    x = x_BSXD.astype(jnp.float32)
    gates = jnp.concatenate((pre_BSX, mix.post), axis=-1)
    kept = jnp.trace(mix.comb, axis1=-2, axis2=-1) / jnp.maximum(mix.comb.sum((-2, -1)), 1e-9)
    return Diagnostics(
        pre=pre_BSX.mean(),
        post=mix.post.mean(),
        gate_range=gates.max() - gates.min(),
        comb_norm=spectral_norm(mix.comb).max(),
        comb_off=1 - kept.mean(),
        out_max=jnp.abs(y_BSD.astype(jnp.float32)).max(),
        stream_max=jnp.abs(x).max(),
        stream_rms=jnp.sqrt(jnp.mean(x * x)),
    )


def merge(first: Diagnostics, second: Diagnostics) -> Diagnostics:
    """A layer's: the mean of gates, the larger of norms and maxima, streams as the layer leaves them."""
    larger = {
        name: jnp.maximum(getattr(first, name), getattr(second, name))
        for name in ("gate_range", "comb_norm", "out_max", "stream_max")
    }
    means = {
        name: (getattr(first, name) + getattr(second, name)) / 2
        for name in ("pre", "post", "comb_off")
    }
    return second._replace(**larger, **means)


def spectral_norm(comb_BSJK: jax.Array) -> jax.Array:
    """Largest singular value of each matrix of positive entries [...,X,X], by the power method (it has no sign to get wrong)."""

    def multiply(v_BSK, _):
        u_BSJ = jnp.sum(comb_BSJK * v_BSK[..., None, :], axis=-1)
        w_BSK = jnp.sum(comb_BSJK * u_BSJ[..., :, None], axis=-2)
        return w_BSK / jnp.maximum(jnp.sqrt(jnp.sum(w_BSK * w_BSK, -1, keepdims=True)), 1e-30), None

    start = jnp.full(comb_BSJK.shape[:-1], comb_BSJK.shape[-1] ** -0.5, comb_BSJK.dtype)
    v_BSK, _ = jax.lax.scan(multiply, start, length=ITERATIONS)
    u_BSJ = jnp.sum(comb_BSJK * v_BSK[..., None, :], axis=-1)
    return jnp.sqrt(jnp.sum(u_BSJ * u_BSJ, axis=-1))
