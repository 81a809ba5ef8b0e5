"""Orthogonalises matrices by ten steps of a fifth-order Newton-Schulz iteration.

Equation: docs/equations.md#muon.

Next file to read: v4jax/train/muon.py.
"""

import jax
import jax.numpy as jnp
from jax import lax

from v4jax.kernels.newton_schulz.op import newton_schulz_step
from v4jax.kernels.tpu import on_tpu

FAST, SHARP = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
COEFFICIENTS = (FAST,) * 8 + (SHARP,) * 2
"""Hybrid Newton-Schulz: eight steps that grow small singular values, two that settle them at 1.

See docs/equations.md#muon.
"""


def newton_schulz(
    g: jax.Array, dtype: str = "float32", implementation: str | None = None
) -> jax.Array:
    """The matrices [..., rows, cols] with their singular values moved to 1 (0 stays 0).

    Any scale works, from the least normal float32 to the largest number: the momentum of a matrix
    that gets no gradient decays through all of them.

    Args:
      g: float32.
      dtype: of the factors of products, "float32" or "bfloat16"; a TPU rounds them to bfloat16
        anyway.
      implementation: of a step (v4jax/kernels/newton_schulz/op.py).
    """
    wide = g.shape[-2] <= g.shape[-1]
    x = _near_one(g if wide else jnp.swapaxes(g, -1, -2))
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    x = x / jnp.where(norm > 0, norm, 1)
    stack = x.reshape(-1, *x.shape[-2:])
    factor = stack.astype(jnp.bfloat16 if on_tpu() else dtype)

    def iterate(pair, abc):
        x, factor = pair
        return newton_schulz_step(x, factor, abc, implementation), None

    steps = jnp.asarray(COEFFICIENTS, x.dtype)
    # Two at a time: one alone would copy the factors, which it reads until the last are written.
    (stack, _), _ = lax.scan(iterate, (stack, factor), steps, unroll=2)
    x = stack.reshape(x.shape)
    return x if wide else jnp.swapaxes(x, -1, -2)


def _near_one(x: jax.Array) -> jax.Array:
    """Each matrix times the power of two that brings its largest element into [1, 4).

    Then no square overflows, and not all of them underflow. A power of two causes no rounding.
    """
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True).astype(jnp.float32)
    exponent = jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23
    inverse = jnp.maximum(254 - exponent, 1)  # exponent of the inverse, kept normal
    return x * jax.lax.bitcast_convert_type(inverse << 23, jnp.float32).astype(x.dtype)
