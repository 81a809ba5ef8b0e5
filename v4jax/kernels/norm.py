"""Root-mean-square norm, computed in float32.

Next file to read: v4jax/model/norm.py.
"""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, eps: float, weight: jax.Array | None = None) -> jax.Array:
    """x * rsqrt(mean(x^2) + eps) [* weight] over the last axis; float32 inside, then x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 if weight is None else x32 * weight.reshape((1,) * (x.ndim - 1) + (-1,))).astype(
        x.dtype
    )
