"""How Linen modules declare a weight: shape, logical axes and initializer on one line, read back ready for use.

Linen is a thin shell here: arithmetic lives in pure functions, modules only declare weights and call them.

Next file to read: v4jax/model/hyper.py.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sharding.rules import AxisRules
from v4jax.quant.fake import fp8_input, fp8_weight


class SparseMode(NamedTuple):
    """How CSA layers attend. dense: to every visible entry, not to the chosen ones. train_indexer: compute the indexer's loss too."""

    dense: bool = False
    train_indexer: bool = False


class Weights(nn.Module):
    """Base of modules that own weights.

    `dtype` is the compute dtype; weights themselves are float32 by default. `quant`: "none", or "official" to compute with the
    low-precision numbers of the served model (v4jax/quant/fake.py). `sparse`: how CSA layers attend.
    """

    rules: AxisRules
    dtype: jnp.dtype
    quant: str
    sparse: SparseMode

    @property
    def context(self) -> tuple[AxisRules, jnp.dtype, str, SparseMode]:
        """What every module hands to those inside it."""
        return self.rules, self.dtype, self.quant, self.sparse

    def weight(
        self, name: str, shape, axes, init, keep_float32: bool = False, fp8: bool = False
    ) -> jax.Array:
        """Declares a weight, then gives it in the compute dtype (or float32), gathered over FSDP axes.

        `fp8`: released files store it as fp8, so under quant="official" it is rounded to that.
        """
        w = self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
        if fp8 and self.quant == "official":
            w = fp8_weight(w)
        return self.rules.gather(w.astype(jnp.float32 if keep_float32 else self.dtype), axes)

    def act_quant(self, x: jax.Array) -> jax.Array:
        """`x` as a low-precision matrix takes it in: fp8 under quant="official" (official `act_quant`)."""
        return fp8_input(x) if self.quant == "official" else x


def constant(value):
    """Initializer that broadcasts `value` over the shape."""
    return lambda key, shape, dtype: jnp.broadcast_to(jnp.asarray(value, dtype), shape)
