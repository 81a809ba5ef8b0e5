"""Root-mean-square norms, computed in float32.

Next file to read: v4jax/model/rotary.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from v4jax.model.weights import Weights


def rms_norm(x: jax.Array, eps: float, weight: jax.Array | None = None) -> jax.Array:
    """x * rsqrt(mean(x^2) + eps) [* weight] over the last axis; float32 inside, then x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 if weight is None else x32 * weight.reshape((1,) * (x.ndim - 1) + (-1,))).astype(
        x.dtype
    )


class RMSNorm(Weights):
    """RMS norm with a learned weight, which stays float32 as in the official code."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.cfg.rms_norm_eps, self.weight("weight"))
