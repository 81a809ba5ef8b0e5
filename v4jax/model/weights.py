"""The base of modules that own weights: each is named on one line and returned ready for use.

What a weight is, its shape, axes, initial value and precision, v4jax/parameters.py says. A module
finds it there by its own place in the tree, so modules must be used inside a Transformer, or
inside modules with the names that they have there.

Linen is a thin shell here: modules name weights and hand them to pure functions.

Next file to read: v4jax/model/hyper.py.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from v4jax.config import WINDOW_ONLY, ModelConfig
from v4jax.context import Context
from v4jax.gradient_sums import LAYER, SUMS, with_sum
from v4jax.initializers import zeros
from v4jax.kernels.rotate import Rotation, rotate
from v4jax.model.adapted import DROPOUT, Weight, product, with_pair
from v4jax.parameter_tree import ADAPTERS, spec_of
from v4jax.parameters import ParamSpec
from v4jax.quant.fake import fp8_input, fp8_weight
from v4jax.quant.packed import Packed
from v4jax.remat import PRODUCTS


class Weights(nn.Module):
    """Base of modules that own weights, which are declared float32.

    Attributes:
      ctx: what every module hands to the modules inside it.
      cfg: the model, which sizes depend on.
    """

    ctx: Context
    cfg: ModelConfig

    def spec(self, name: str) -> ParamSpec:
        """What the table of parameters says of this module's weight `name`."""
        return spec_of((*self.path, name))

    def stored(self, name: str, ratio: int = WINDOW_ONLY) -> Any:
        """Declares a weight and returns it as it is stored, cut over all devices.

        That is in float32, or packed (v4jax/quant/packed.py). With sums of gradients
        (v4jax/gradient_sums.py) it adds the weight's gradient to its sum. Where the context says
        that weights are frozen it is a constant.

        Args:
          ratio: the compress ratio, where the shape depends on it.
        """
        given = self.get_variable("params", name)
        if isinstance(given, Packed):  # Linen would compare it with one array
            return given
        spec = self.spec(name)
        w = self.param(name, self._init(spec), spec.size(self.cfg, ratio), jnp.float32)
        if self.ctx.frozen:
            return jax.lax.stop_gradient(w)
        if self.has_variable(SUMS, name):
            total = self.variable(SUMS, name, jnp.zeros_like, w)
            layer = self.get_variable(LAYER, name)
            rules = self.ctx.rules if self.ctx.sums is None else self.ctx.sums
            summed: Any = with_sum(rules, spec.axes, w, total.value, layer)
            w, total.value = summed
        return w

    def weight(self, name: str, ratio: int = WINDOW_ONLY) -> jax.Array:
        """Declares a weight and returns it as products use it, gathered over FSDP axes.

        It is float32 where the table says so, otherwise in the compute dtype. What released files
        store as fp8 is rounded to that under quant="official". A packed weight is gathered first
        and read then: fewer bytes travel.
        """
        spec = self.spec(name)
        w = self.stored(name, ratio)
        dtype = jnp.dtype(jnp.float32) if spec.float32 else self.ctx.dtype
        if isinstance(w, Packed):
            whole = jax.tree.map(lambda part: self.ctx.rules.gather(part, spec.axes), w)
            return whole.numbers(dtype)
        if spec.precision == "fp8" and self.ctx.quant == "official":
            w = fp8_weight(w)
        w = w.astype(dtype)
        return self._whole(w, spec.axes)

    def matrix(self, name: str, ratio: int = WINDOW_ONLY) -> Weight:
        """`weight`, with its low-rank pair where the collection "lora" has one."""
        w, axes = self.weight(name, ratio), self.spec(name).axes
        pair = self.get_variable(ADAPTERS, name)
        if pair is None:
            return w
        key = self.make_rng(DROPOUT) if self.ctx.dropout > 0 else None
        return with_pair(w, pair, axes, self._whole, key)

    def _whole(self, w: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """`w`, gathered over FSDP axes unless it is already."""
        return w if self.ctx.sums is not None else self.ctx.rules.gather(w, axes)

    def router_state(self, name: str) -> jax.Array:
        """Declares what the router keeps, in the collection "router", and returns it in float32."""
        spec = spec_of(("router", *self.path, name))

        def fresh() -> jax.Array:
            # A key that nothing needs would change the keys of other weights.
            key = None if spec.init is zeros else self.make_rng("params")
            return self._init(spec)(key, spec.size(self.cfg), jnp.float32)

        return self.variable("router", name, fresh).value

    def _init(self, spec: ParamSpec) -> Any:
        """The initializer, whose values carry their logical axes."""
        return nn.with_logical_partitioning(spec.init(self.cfg), spec.axes)

    def dense(self, x: jax.Array, w: Weight) -> jax.Array:
        """x @ w in the dtype of x, by the implementation that `ctx` names; "dots" keeps it."""
        return checkpoint_name(product(self.ctx, x, w), PRODUCTS)

    def rotate(self, x: jax.Array, rope: Rotation, inverse: bool = False) -> jax.Array:
        """x rotated (v4jax/kernels/rotate.py), by the implementation that `ctx` names."""
        return rotate(x, rope, inverse, self.ctx.kernels.rotate)

    def act_quant(self, x: jax.Array) -> jax.Array:
        """`x` as input of a low-precision matrix: rounded to fp8 under quant="official"."""
        return fp8_input(x) if self.ctx.quant == "official" else x
