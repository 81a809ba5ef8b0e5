"""The base of modules that own weights: each is declared on one line and returned ready for use.

Linen is a thin shell here: modules declare weights and hand them to pure functions.

Next file to read: v4jax/model/hyper.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from v4jax.context import Context
from v4jax.quant.fake import fp8_input, fp8_weight


class Weights(nn.Module):
    """Base of modules that own weights, which are declared float32.

    Attributes:
      ctx: what every module hands to the modules inside it.
    """

    ctx: Context

    def weight(
        self, name: str, shape, axes, init, keep_float32: bool = False, fp8: bool = False
    ) -> jax.Array:
        """Declares a weight and returns it in the compute dtype, gathered over FSDP axes.

        Args:
          axes: logical axis names, one per axis of `shape`.
          keep_float32: return float32 instead.
          fp8: released files store it as fp8, so quant="official" rounds it to that.
        """
        w = self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
        if fp8 and self.ctx.quant == "official":
            w = fp8_weight(w)
        dtype = jnp.dtype(jnp.float32) if keep_float32 else self.ctx.dtype
        return self.ctx.rules.gather(w.astype(dtype), axes)

    def act_quant(self, x: jax.Array) -> jax.Array:
        """`x` as input of a low-precision matrix: rounded to fp8 under quant="official"."""
        return fp8_input(x) if self.ctx.quant == "official" else x


def constant(value):
    """An initializer that broadcasts `value` to the shape."""
    return lambda key, shape, dtype: jnp.broadcast_to(jnp.asarray(value, dtype), shape)
