"""How Linen modules declare a weight: shape, logical axes and initializer on one line, read back ready for use.

Linen is a thin shell here: arithmetic lives in pure functions, modules only declare weights and call them.

Next file to read: v4jax/model/hyper.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sharding.rules import AxisRules


class Weights(nn.Module):
    """Base of modules that own weights. `dtype` is the compute dtype; weights themselves are float32 by default."""

    rules: AxisRules
    dtype: jnp.dtype

    def weight(self, name: str, shape, axes, init, keep_float32: bool = False) -> jax.Array:
        """Declares a weight, then gives it in the compute dtype (or float32), gathered over FSDP axes."""
        w = self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
        return self.rules.gather(w.astype(jnp.float32 if keep_float32 else self.dtype), axes)


def constant(value):
    """Initializer that broadcasts `value` over the shape."""
    return lambda key, shape, dtype: jnp.broadcast_to(jnp.asarray(value, dtype), shape)
