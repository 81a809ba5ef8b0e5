"""The RMS norm with a learned weight.

Next file to read: v4jax/model/rotary.py.
"""

import flax.linen as nn
import jax

from v4jax.kernels.norm import rms_norm
from v4jax.model.weights import Weights


class RMSNorm(Weights):
    """RMS norm with a learned weight, which stays float32 as in the official code."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.cfg.rms_norm_eps, self.weight("weight"))
