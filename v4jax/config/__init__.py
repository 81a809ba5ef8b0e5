"""The configuration of a DeepSeek-V4 model: `ModelConfig`, and the words it is written in.

Next file to read: v4jax/config/model.py.
"""

from v4jax.config.layers import CSA, HCA, WINDOW_ONLY, LayerGroup, LayerKind
from v4jax.config.model import ModelConfig
from v4jax.config.rope import RopeScaling

__all__ = ["CSA", "HCA", "WINDOW_ONLY", "LayerGroup", "LayerKind", "ModelConfig", "RopeScaling"]
