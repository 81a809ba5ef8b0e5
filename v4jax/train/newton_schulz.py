"""Orthogonalises matrices by ten steps of a fifth-order Newton-Schulz iteration.

Equation: docs/equations.md#muon.

Next file to read: v4jax/train/muon.py.
"""

import jax
import jax.numpy as jnp
from jax import lax

from v4jax.kernels.tpu import on_tpu

FAST, SHARP = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
COEFFICIENTS = (FAST,) * 8 + (SHARP,) * 2
"""Hybrid Newton-Schulz: eight steps that grow small singular values, two that settle them at 1.

See docs/equations.md#muon.
"""


def newton_schulz(g: jax.Array, dtype: str = "float32") -> jax.Array:
    """The matrices [..., rows, cols] with their singular values moved to 1 (0 stays 0).

    Any scale works, from the least normal float32 to the largest number: the momentum of a matrix
    that gets no gradient decays through all of them.

    Args:
      g: float32.
      dtype: of the factors of products, "float32" or "bfloat16". Sums, Gram matrices and the
        iterate stay float32: an iterate in bfloat16 would lose the small singular directions.
    """
    wide = g.shape[-2] <= g.shape[-1]
    x = _near_one(g if wide else jnp.swapaxes(g, -1, -2))
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    x = x / jnp.where(norm > 0, norm, 1)

    def iterate(x, abc):
        rounded = _factor(x, dtype)
        gram = _product(rounded, jnp.swapaxes(rounded, -1, -2))
        square = _product(_factor(abc[2] * gram, dtype), _factor(gram, dtype))
        polynomial = abc[1] * gram + square
        return abc[0] * x + _product(_factor(polynomial, dtype), rounded), None

    x, _ = lax.scan(iterate, x, jnp.asarray(COEFFICIENTS, x.dtype))
    return x if wide else jnp.swapaxes(x, -1, -2)


def _factor(x: jax.Array, dtype: str) -> jax.Array:
    """`x` as a factor of products.

    A TPU rounds float32 factors to bfloat16. XLA would leave that to each product, which then reads
    twice the bytes, more than once; so they are rounded here, and the barrier keeps it so.
    """
    if on_tpu():
        return jax.lax.optimization_barrier(x.astype(jnp.bfloat16))
    return x.astype(dtype)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b, float32.

    Factors in float32 run in the platform's own precision (TF32 on GPUs), unlike the model's
    products: Muon tolerates bfloat16 here.
    """
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _near_one(x: jax.Array) -> jax.Array:
    """Each matrix times the power of two that brings its largest element into [1, 4).

    Then no square overflows, and not all of them underflow. A power of two causes no rounding.
    """
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True).astype(jnp.float32)
    exponent = jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23
    inverse = jnp.maximum(254 - exponent, 1)  # exponent of the inverse, kept normal
    return x * jax.lax.bitcast_convert_type(inverse << 23, jnp.float32).astype(x.dtype)
