"""Rotary positions: the angles of a head's pairs, plain or with YaRN.

There are two tables (docs/equations.md#rotary). Layers of compress ratio 0 and MTP use rope_theta
without YaRN. CSA and HCA layers use compress_rope_theta with YaRN, for queries, window keys,
entries and indexer. cos and sin are never scaled: the attention factor is 1.
v4jax/kernels/rotate.py applies them.

Shapes: R rope dims; `...` any leading axes.
Next file to read: v4jax/model/compressor.py.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.config import ModelConfig, RopeScaling
from v4jax.kernels.rotate import Rotation


def frequencies(cfg: ModelConfig, compressed: bool) -> np.ndarray:
    """Angle per position of each pair, float32 [R/2] (official `precompute_freqs_cis`)."""
    theta = cfg.compress_rope_theta if compressed else cfg.rope_theta
    assert theta is not None, "a model with compressed layers states it"
    pairs = cfg.qk_rope_head_dim // 2
    freqs = theta ** (-np.arange(pairs, dtype=np.float64) / pairs)
    if compressed and cfg.rope_scaling is not None:
        kept = 1 - _ramp(cfg.rope_scaling, theta, cfg.qk_rope_head_dim)
        freqs = freqs * kept + freqs / cfg.rope_scaling.factor * (1 - kept)
    return freqs.astype(np.float32)


def _ramp(yarn: RopeScaling, theta: float, dims: int) -> np.ndarray:
    """Share of YaRN's lower frequency: 0 for fast pairs, 1 for slow ones, linear between; [R/2]."""

    def pair_with(rotations: float) -> float:
        return (
            dims
            * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi))
            / (2 * math.log(theta))
        )

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), dims - 1)
    # The official code avoids division by zero the same way.
    width = (high - low) or 0.001
    return np.clip((np.arange(dims // 2) - low) / width, 0, 1)


def rotation(cfg: ModelConfig, positions: jax.Array, *, compressed: bool) -> Rotation:
    """Rotation at integer `positions` [...]: cos and sin are [..., R/2]."""
    angles = jnp.multiply.outer(positions.astype(jnp.float32), frequencies(cfg, compressed))
    return Rotation(jnp.cos(angles), jnp.sin(angles))
