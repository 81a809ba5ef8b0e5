"""fp8 e4m3 with one scale per 128 x 128 block: the format of most matrices in released files.

Shapes: O output features, I input features, P and Q blocks along O and I (the last ones may be
partial).
Next file to read: v4jax/quant/mxfp4.py.
"""

import ml_dtypes
import numpy as np

from v4jax.quant.scales import check_finite, power_of_two

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BLOCK = 128
LARGEST = 448.0
LEAST_AMAX = 1e-4
"""The least magnitude that a block is taken to have (official act_quant, DeepGEMM's block cast)."""

_VALUE = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
_IS_NAN = np.isnan(_VALUE)


def scale_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Shape [P, Q] of the scales of a matrix [O, I]. Example: (130, 256) -> (2, 2)."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def block_scale(x_OI: np.ndarray) -> np.ndarray:
    """2^ceil(log2(max |x| / 448)) of each block, float32 [P, Q]."""
    amax_PI = np.stack(
        [np.abs(x_OI[row : row + BLOCK]).max(axis=0) for row in range(0, len(x_OI), BLOCK)]
    )
    amax_PQ = np.maximum.reduceat(amax_PI, np.arange(0, x_OI.shape[1], BLOCK), axis=1)
    return power_of_two(np.maximum(amax_PQ, np.float32(LEAST_AMAX)), LARGEST)


def quantise(x_OI: np.ndarray, scale_PQ: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(e4m3 [O, I], scale float32 [P, Q]): x / scale, saturated at 448, rounded to nearest even.

    Args:
      x_OI: float32.
      scale_PQ: positive float32; None: `block_scale`.

    Raises:
      ValueError: x is not finite.
    """
    check_finite(x_OI)
    scale_PQ = block_scale(x_OI) if scale_PQ is None else scale_PQ
    code_OI = np.empty(x_OI.shape, np.uint8)
    with np.errstate(over="ignore"):
        # One band of blocks at a time stays in the cache.
        for row, scale_Q in zip(range(0, len(x_OI), BLOCK), scale_PQ, strict=True):
            code_OI[row : row + BLOCK] = codes(
                x_OI[row : row + BLOCK] / np.repeat(scale_Q, BLOCK)[: x_OI.shape[1]][None]
            )
    return code_OI.view(E4M3), scale_PQ


def codes(y: np.ndarray) -> np.ndarray:
    """e4m3 bytes of float32 numbers, rounded to nearest even and saturated at 448.

    A cast by ml_dtypes gives the same, but works on one number at a time. A normal number keeps 3
    bits of its mantissa: half of the last one (less one, where it is even) is added and the rest
    cut off. Below 2^-6, e4m3 counts in steps of 2^-9, as float32 does from 2^14 on.
    """
    magnitude = np.minimum(np.abs(y), np.float32(LARGEST))
    bits = magnitude.view(np.uint32)
    normal = (bits + (np.uint32(0x7FFFF) + (bits >> np.uint32(20) & np.uint32(1)))) >> np.uint32(20)
    small = (magnitude + np.float32(2**14)).view(np.uint32) - np.float32(2**14).view(np.uint32)
    code = np.where(magnitude < np.float32(2**-6), small, normal - np.uint32((127 - 7) << 3))
    return (code | y.view(np.uint32) >> np.uint32(24) & np.uint32(128)).astype(np.uint8)


def check_codes(code_OI: np.ndarray) -> None:
    """Checks that no code is NaN (byte 127 or 255).

    Raises:
      ValueError: a code is NaN.
    """
    for row in range(0, len(code_OI), BLOCK):
        if _IS_NAN[code_OI[row : row + BLOCK].view(np.uint8)].any():
            raise ValueError("got an e4m3 NaN; must be a number")


def dequantise(code_OI: np.ndarray, scale_PQ: np.ndarray) -> np.ndarray:
    """float32 [O, I]: code times its block's scale, rounded once (not at all for powers of two).

    Raises:
      ValueError: a NaN code (byte 127 or 255), or a product that float32 cannot hold.
    """
    check_codes(code_OI)
    rows, width = code_OI.shape
    x_OI = np.empty((rows, width), np.float32)
    with np.errstate(over="ignore"):
        # One band of blocks at a time stays in the cache.
        for row, scale_Q in zip(range(0, len(x_OI), BLOCK), scale_PQ, strict=True):
            band_OI = _VALUE[code_OI[row : row + BLOCK].view(np.uint8)]
            np.multiply(
                band_OI, np.repeat(scale_Q, BLOCK)[:width][None], out=x_OI[row : row + BLOCK]
            )
    if scale_PQ.size and scale_PQ.max() * 2.0 > np.finfo(np.float32).max / LARGEST:
        check_finite(x_OI)
    return x_OI


def spread(scale_PQ: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Scale of every element, float32 [O, I]; a single row of blocks is repeated as a view."""
    rows, columns = shape
    scale_PI = np.repeat(scale_PQ, BLOCK, axis=1)[:, :columns]
    return (
        np.repeat(scale_PI, BLOCK, axis=0)[:rows]
        if len(scale_PI) > 1
        else np.broadcast_to(scale_PI, shape)
    )
