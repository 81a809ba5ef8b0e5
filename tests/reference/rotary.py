"""Rotary embedding, restated: frequencies with YaRN, pairs as complex numbers, and back.

Plain NumPy from docs/equations.md#rotary; slow on purpose. All arithmetic is float64.

Legend: S positions, R rope dims, H head dim.
Next file to read: compressor.py.
"""

import math

import numpy as np

from v4jax.config import WINDOW_ONLY, ModelConfig


def frequencies(cfg: ModelConfig, compress_ratio: int) -> np.ndarray:
    """Radians per position of each pair, float64 [R/2], of a layer with this compress ratio.

    Window-only layers and MTP: rope_theta, never YaRN. CSA and HCA layers, everywhere in them:
    compress_rope_theta with YaRN, at every length (trap 5) and without a factor on cos and sin
    (trap 4).
    """
    theta = cfg.rope_theta if compress_ratio == WINDOW_ONLY else cfg.compress_rope_theta
    dims = cfg.qk_rope_head_dim
    plain = np.array([theta ** (-2 * pair / dims) for pair in range(dims // 2)])
    if compress_ratio == WINDOW_ONLY or cfg.rope_scaling is None:
        return plain
    yarn = cfg.rope_scaling

    def correction_dim(turns: float) -> float:
        """The (fractional) pair that makes `turns` full turns within the original length."""
        length = yarn.original_max_position_embeddings
        return dims * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(correction_dim(yarn.beta_fast)), 0)
    high = min(math.ceil(correction_dim(yarn.beta_slow)), dims - 1)
    if low == high:
        high += 0.001  # official linear_ramp_factor: no division by zero
    mixed = np.empty(dims // 2)
    for pair in range(dims // 2):
        slowed = min(
            max((pair - low) / (high - low), 0.0), 1.0
        )  # 0: fast pairs stay; 1: slow pairs divided by factor
        mixed[pair] = plain[pair] * (1 - slowed) + plain[pair] / yarn.factor * slowed
    return mixed


def rotate(
    x: np.ndarray, positions_S: np.ndarray, frequencies: np.ndarray, inverse: bool = False
) -> np.ndarray:
    """x [S, ..., H] with its LAST R dims rotated by position * frequency.

    `inverse` rotates them back. Pair i is dims (2i, 2i+1) of the rotary part (trap 9): the complex
    number x[2i] + i x[2i+1] times e^(+-i angle).
    """
    dims = 2 * len(frequencies)
    result = np.array(x, dtype=np.float64)
    for s, position in enumerate(positions_S):
        turn = np.exp((-1j if inverse else 1j) * position * frequencies)
        rope = result[s, ..., -dims:]
        turned = (rope[..., 0::2] + 1j * rope[..., 1::2]) * turn
        rope[..., 0::2] = turned.real
        rope[..., 1::2] = turned.imag
    return result
