"""The base of modules that own weights: each is declared on one line and returned ready for use.

Linen is a thin shell here: modules declare weights and hand them to pure functions.

Next file to read: v4jax/model/hyper.py.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sharding.rules import AxisRules
from v4jax.quant.fake import fp8_input, fp8_weight


class SparseMode(NamedTuple):
    """How CSA layers attend.

    Attributes:
      dense: to every visible entry instead of the chosen ones.
      train_indexer: compute the indexer's loss too.
    """

    dense: bool = False
    train_indexer: bool = False


class Weights(nn.Module):
    """Base of modules that own weights.

    Attributes:
      rules: layout.
      dtype: compute dtype; weights are declared float32.
      quant: "none", or "official" for the low-precision numbers of the served model
        (v4jax/quant/fake.py).
      sparse: how CSA layers attend.
    """

    rules: AxisRules
    dtype: jnp.dtype
    quant: str
    sparse: SparseMode

    @property
    def context(self) -> tuple[AxisRules, jnp.dtype, str, SparseMode]:
        """What every module hands to the modules inside it."""
        return self.rules, self.dtype, self.quant, self.sparse

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
        if fp8 and self.quant == "official":
            w = fp8_weight(w)
        return self.rules.gather(w.astype(jnp.float32 if keep_float32 else self.dtype), axes)

    def act_quant(self, x: jax.Array) -> jax.Array:
        """`x` as input of a low-precision matrix: rounded to fp8 under quant="official"."""
        return fp8_input(x) if self.quant == "official" else x


def constant(value):
    """An initializer that broadcasts `value` to the shape."""
    return lambda key, shape, dtype: jnp.broadcast_to(jnp.asarray(value, dtype), shape)
