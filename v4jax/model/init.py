"""Fresh parameters, and the shapes and logical axes of all parameters.

Next file to read: v4jax/model/transformer.py.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from v4jax.config import ModelConfig
from v4jax.context import Context
from v4jax.model.segments import read_segments
from v4jax.model.transformer import Transformer


def init_params(cfg: ModelConfig, key: jax.Array):
    """Fresh parameters: matrices are normal with standard deviation initializer_range.

    Norms are 1; sinks, ape and biases are 0; hash tables are balanced; hyper-connections start near
    a static mix (docs/equations.md#mhc).
    """
    return jax.jit(lambda key: nn.unbox(_boxed(cfg, key)))(key)


def abstract_params(cfg: ModelConfig):
    """Shapes and dtypes of the parameters (jax.ShapeDtypeStruct), without computing anything."""
    return nn.unbox(_abstract_boxed(cfg))


def param_axes(cfg: ModelConfig):
    """Logical axes of the parameters: the same tree, a tuple of names (or None) for each array."""

    def is_box(leaf):
        return isinstance(leaf, nn.LogicallyPartitioned)

    return jax.tree.map(lambda leaf: tuple(leaf.names), _abstract_boxed(cfg), is_leaf=is_box)


@functools.cache
def _abstract_boxed(cfg: ModelConfig):
    """Shapes, dtypes and axes; cached, because several callers trace the model and that is slow."""
    return jax.eval_shape(lambda: _boxed(cfg, jax.random.key(0)))


def _boxed(cfg: ModelConfig, key: jax.Array):
    """Parameters in Flax's boxes, which carry the logical axes."""
    tokens_BS = jnp.zeros((1, 1), jnp.int32)
    segments = read_segments(cfg, tokens_BS.shape[1], None)
    variables = Transformer(Context(), cfg).init(key, tokens_BS, segments)
    return dict(variables["params"]) | {"router": dict(variables["router"])}
