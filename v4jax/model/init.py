"""Fresh parameters. Their shapes and logical axes alone are those of v4jax/parameter_tree.py.

Next file to read: v4jax/model/transformer.py.
"""

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


def _boxed(cfg: ModelConfig, key: jax.Array):
    """Parameters in Flax's boxes, which carry the logical axes."""
    tokens_BS = jnp.zeros((1, 1), jnp.int32)
    segments = read_segments(cfg, tokens_BS.shape[1], None)
    variables = Transformer(Context(), cfg).init(key, tokens_BS, segments)
    return dict(variables["params"]) | {"router": dict(variables["router"])}
