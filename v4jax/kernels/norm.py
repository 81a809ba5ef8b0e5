"""Root-mean-square norm, computed in float32.

Next file to read: v4jax/model/norm.py.
"""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, eps: float, weight: jax.Array | None = None) -> jax.Array:
    """x * rsqrt(mean(x^2) + eps) [* weight] over the last axis; float32 inside, then x's dtype.

    The gradient at a row of zeros is that of a row of RMS 1 (`over_rms`).
    """
    x32 = x.astype(jnp.float32)
    x32 = over_rms(x32, jnp.mean(x32 * x32, axis=-1, keepdims=True), eps)
    return (x32 if weight is None else x32 * weight.reshape((1,) * (x.ndim - 1) + (-1,))).astype(
        x.dtype
    )


def over_rms(y: jax.Array, square: jax.Array, eps: float) -> jax.Array:
    """y * rsqrt(square + eps), where y is linear in rows x whose mean square is `square`.

    The derivative at x = 0 is rsqrt(eps): 1e3 to 1e10. A row of zeros stays so from layer to layer
    where it sees only its like, and the product over norms overflows. So its gradient is that of
    RMS 1: the derivative times sqrt(eps), which has its direction (docs/equations.md#notation).

    Args:
      y: float32.
      square: float32, mean squares; its last axis has size 1.
      eps: above 0.
    """
    slope = jnp.where(square == 0, eps**0.5, 1.0)
    return _with_slope(y * jax.lax.rsqrt(square + eps), slope)


@jax.custom_jvp
def _with_slope(y: jax.Array, slope: jax.Array) -> jax.Array:
    """y, whose gradient is multiplied by `slope`."""
    del slope
    return y


@_with_slope.defjvp
def _with_slope_jvp(primals, tangents):
    y, slope = primals
    return y, tangents[0] * slope
