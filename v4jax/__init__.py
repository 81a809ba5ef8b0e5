"""DeepSeek-V4 as a functional Flax model in JAX: the public names.

The model is in v4jax/model/transformer.py.
"""

from v4jax.api import load
from v4jax.checkpoint.export import save_safetensors
from v4jax.checkpoint.names import official_names, to_official
from v4jax.config import ModelConfig
from v4jax.functional import forward, init_params
from v4jax.parameter_tree import abstract_params, param_axes
from v4jax.train.loss import loss

__all__ = [
    "ModelConfig",
    "abstract_params",
    "forward",
    "init_params",
    "load",
    "loss",
    "official_names",
    "param_axes",
    "save_safetensors",
    "to_official",
]
