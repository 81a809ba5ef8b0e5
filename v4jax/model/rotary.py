"""Rotary positions: interleaved pairs in the last dims of a head, plain or with YaRN, in float32.

There are two tables (docs/equations.md#rotary). Layers of compress ratio 0 and MTP use rope_theta
without YaRN. CSA and HCA layers use compress_rope_theta with YaRN, for queries, window keys,
entries and indexer. cos and sin are never scaled: the attention factor is 1.

Shapes: R rope dims, H head dim; `...` any leading axes.
Next file to read: v4jax/model/compressor.py.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.config import ModelConfig, RopeScaling


class Rotation(NamedTuple):
    """cos and sin of every pair's angle, float32 [..., R/2]."""

    cos: jax.Array
    sin: jax.Array

    def heads(self) -> "Rotation":
        """The same rotation with an axis for heads before the last."""
        return Rotation(self.cos[..., None, :], self.sin[..., None, :])


def frequencies(cfg: ModelConfig, compressed: bool) -> np.ndarray:
    """Angle per position of each pair, float32 [R/2] (official `precompute_freqs_cis`)."""
    theta = cfg.compress_rope_theta if compressed else cfg.rope_theta
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


def rotation(cfg: ModelConfig, compressed: bool, positions: jax.Array) -> Rotation:
    """Rotation at integer `positions` [...]: cos and sin are [..., R/2]."""
    angles = jnp.multiply.outer(positions.astype(jnp.float32), frequencies(cfg, compressed))
    return Rotation(jnp.cos(angles), jnp.sin(angles))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rotate(x: jax.Array, rope: Rotation, inverse: bool = False) -> jax.Array:
    """x with pairs (2i, 2i+1) of its last R dims rotated, in float32; other dims are unchanged.

    The gradient is the inverse rotation (autodiff would pad and add every slice); angles get none.

    Args:
      x: [..., H] with H >= R.
      rope: broadcastable to [..., R/2].
      inverse: rotate by the negative angle, as for the attention output.
    """
    width = 2 * rope.cos.shape[-1]
    passed, turned = x[..., :-width], x[..., -width:].astype(jnp.float32)
    even, odd = turned[..., 0::2], turned[..., 1::2]
    sin = -rope.sin if inverse else rope.sin
    turned = jnp.stack((even * rope.cos - odd * sin, odd * rope.cos + even * sin), axis=-1)
    return jnp.concatenate((passed, turned.reshape(*x.shape[:-1], width).astype(x.dtype)), axis=-1)


rotate.defvjp(
    lambda x, rope, inverse: (rotate(x, rope, inverse), rope),
    lambda inverse, rope, ct: (rotate(ct, rope, not inverse), None),
)
