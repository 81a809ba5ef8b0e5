"""MXFP4: e2m1 numbers, two per byte, one power-of-two scale per 32: routed experts of releases.

Shapes: O output features, I input features, W bytes (I / 2), Q blocks (I / 32).
Next file to read: v4jax/checkpoint/names.py.
"""

import ml_dtypes
import numpy as np

from v4jax.quant.scales import check_finite, power_of_two, to_ue8m0

E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
BLOCK = 32
LARGEST = 6.0
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_BAND = 2**18
"""Numbers worked on at a time: few enough for the cache, enough that threads seldom wait."""
LEAST_AMAX = 6 * 2.0**-126
"""The least magnitude that a block is taken to have (official fp4_act_quant).

Its scale is then a normal number.
"""


def scale_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """Shape [O, Q] of the scales of a matrix [O, I].

    Raises:
      ValueError: I is not a multiple of 32.
    """
    if shape[1] % BLOCK:
        raise ValueError(f"MXFP4: got {shape[1]} input features; must be a multiple of {BLOCK}")
    return shape[0], shape[1] // BLOCK


def pack(code_OI: np.ndarray) -> np.ndarray:
    """Codes 0 to 15, uint8 [O, I] -> int8 [O, W]; the even column is in the low nibble.

    This is the order of the official convert.py.
    """
    return (code_OI[:, 0::2] | (code_OI[:, 1::2] << np.uint8(4))).view(np.int8)


def unpack(packed_OW: np.ndarray) -> np.ndarray:
    """int8 [O, W] -> codes 0 to 15, uint8 [O, I]."""
    byte_OW = packed_OW.view(np.uint8)
    return np.stack([byte_OW & np.uint8(15), byte_OW >> np.uint8(4)], axis=-1).reshape(
        len(byte_OW), -1
    )


def block_scale(x_OI: np.ndarray) -> np.ndarray:
    """2^ceil(log2(max |x| / 6)) of each 32 along the input, float32 [O, Q]."""
    amax_OQ = np.abs(x_OI).reshape(scale_shape(x_OI.shape) + (BLOCK,)).max(axis=-1)
    return power_of_two(np.maximum(amax_OQ, np.float32(LEAST_AMAX)), LARGEST)


def quantise(x_OI: np.ndarray, scale_OQ: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(int8 [O, W], scale float32 [O, Q]): x / scale, saturated at 6, rounded to nearest even.

    Args:
      x_OI: float32 or bfloat16.
      scale_OQ: positive float32; None: `block_scale`.

    Raises:
      ValueError: x is not finite, or I is not a multiple of 32.
    """
    rows, blocks = scale_shape(x_OI.shape)
    packed_OW, found_OQ = (
        np.empty((rows, x_OI.shape[1] // 2), np.int8),
        np.empty((rows, blocks), np.float32),
    )
    band = max(1, _BAND // max(1, x_OI.shape[1]))
    for some in (slice(row, row + band) for row in range(0, rows, band)):
        x, scale = x_OI[some], None if scale_OQ is None else scale_OQ[some]
        found = _quantise_bits(x, scale) if x.dtype == BFLOAT16 and x.size else None
        packed_OW[some], found_OQ[some] = found or _quantise_numbers(
            x.astype(np.float32, copy=False), scale
        )
    return packed_OW, found_OQ


def _quantise_numbers(x: np.ndarray, scale: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """`quantise` of float32 numbers."""
    check_finite(x)
    scale = block_scale(x) if scale is None else scale
    return pack(codes((x.reshape(*scale.shape, BLOCK) / scale[..., None]).reshape(x.shape))), scale


def codes(y: np.ndarray) -> np.ndarray:
    """Codes 0 to 15 of float32 numbers, rounded to nearest even and saturated.

    A code counts the midpoints between numbers, seven in all, that lie below the magnitude; 8 is
    the sign. A cast to ml_dtypes' float4 gives the same, but works on one number at a time.
    """
    magnitude = np.abs(y)
    code = (y.view(np.uint32) >> np.uint32(28)).astype(np.uint8) & np.uint8(8)
    # A tie goes to the even code: down at `low`, up at `high`.
    for low, high in ((0.25, 0.75), (1.25, 1.75), (2.5, 3.5)):
        code += (magnitude > np.float32(low)).view(np.uint8)
        code += (magnitude >= np.float32(high)).view(np.uint8)
    return code + (magnitude > np.float32(5)).view(np.uint8)


def _quantise_bits(
    x_OI: np.ndarray, scale_OQ: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """`quantise` of bfloat16 on its 16 bits, the fast way; None if a number needs the long way.

    Such a number is not finite, or beyond 6 scales, or in a block so small that a bfloat16 of its
    size has fewer bits. A bfloat16 is sign, exponent and 7 bits of mantissa, so x / 2^e subtracts
    from the exponent, and the code is looked up.
    """
    bits_OI = x_OI.view(np.uint16)
    amax = bits_OI.reshape(-1) & np.uint16(0x7FFF)
    # The largest of each 32 numbers. Neighbours are compared first, so that each step runs over the
    # whole band.
    for _ in range(5):
        amax = np.maximum(amax[0::2], amax[1::2])
    amax_OQ = amax.reshape(scale_shape(x_OI.shape)).astype(np.int32)
    # The least power of two that is at least amax / 6: 6 is 1.5 * 2^2, and 1.5 has a mantissa of
    # 64.
    if scale_OQ is None:
        exponent_OQ = np.maximum((amax_OQ + 63 >> 7) - 2, 1)
    else:
        exponent_OQ = (scale_OQ.view(np.uint32) >> np.uint32(23)).astype(np.int32)
        if (scale_OQ.view(np.uint32) & np.uint32(0x7FFFFF)).any():
            return None
    unusual = (
        (amax_OQ >= 0x7F80)
        | (exponent_OQ > 252)
        | ((amax_OQ > 0) & ((exponent_OQ < 3) | (amax_OQ - (exponent_OQ << 7) > _SIX)))
    )
    if unusual.any():
        return None
    # A block of zeros may have exponent 1. Subtracted from the bits of 0, that would give the bits
    # of 0.5.
    taken_OQ = np.maximum(exponent_OQ, 3) << 7
    relative = bits_OI.reshape(-1, BLOCK) - taken_OQ.astype(np.uint16).reshape(-1, 1)
    pair = np.take(_CODE, relative, mode="wrap").view(np.uint16)
    packed = (pair | pair >> np.uint16(4)).astype(np.uint8).reshape(len(x_OI), -1)
    return packed.view(np.int8), (exponent_OQ.astype(np.uint32) << np.uint32(23)).view(np.float32)


_SIX = 2 << 7 | 64
"""Bits of 6 where exponent bits of 0 mean 2^0."""


def _code_table() -> np.ndarray:
    """Code of every bfloat16 whose exponent is relative to that of its scale, uint8 [2^16].

    Up to 6 scales, numbers of different sign never share an index.
    """
    index = np.arange(2**16)
    positive = (index <= _SIX) | (index >= 2**15 + 2**9)
    bits = np.where(positive, (index + 2**15) % 2**16 - 2**15, index - 2**15)
    size = np.ldexp(1 + (bits & 127) / 128, bits >> 7).astype(np.float32)
    return codes(np.where(positive, size, -size))


_CODE = _code_table()


def dequantise(packed_OW: np.ndarray, scale_OQ: np.ndarray) -> np.ndarray:
    """bfloat16 [O, I]: code times its block's scale, exact.

    Args:
      scale_OQ: float32 powers of two.

    Raises:
      ValueError: a product that bfloat16 cannot hold, or a scale that is no power of two.
    """
    rows, half = packed_OW.shape
    _, blocks = scale_shape((rows, 2 * half))
    high_OQ1 = (to_ue8m0(scale_OQ).astype(np.uint16) << np.uint16(8))[..., None]
    x_OW = np.empty((rows, half), np.uint32)
    band = max(1, _BAND // max(1, 2 * half))
    for some in (slice(row, row + band) for row in range(0, rows, band)):
        byte = packed_OW[some].view(np.uint8).reshape(-1, blocks, BLOCK // 2)
        np.take(_PAIR, (byte | high_OQ1[some]).reshape(-1, half), mode="wrap", out=x_OW[some])
    x_OI = x_OW.view(BFLOAT16)
    if scale_OQ.size and scale_OQ.max() > np.finfo(np.float32).max / LARGEST:
        check_finite(x_OI)
    return x_OI


def _pair_table() -> np.ndarray:
    """The two bfloat16 at index scale byte * 256 + packed byte, as one uint32; low nibble first."""
    # 0, 0.5, 1, 1.5, 2, 3, 4, 6, then their negatives.
    value = np.arange(16, dtype=np.uint8).view(E2M1).astype(np.float64)
    pair = np.stack([np.tile(value, 16), np.repeat(value, 16)], axis=1)
    # `dequantise` checks for overflow.
    with np.errstate(over="ignore"):
        return (
            (np.ldexp(1.0, np.arange(256) - 127)[:, None, None] * pair)
            .astype(BFLOAT16)
            .reshape(-1)
            .view(np.uint32)
        )


_PAIR = _pair_table()
