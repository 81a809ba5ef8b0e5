"""Block scales: powers of two as official kernels choose them, and their bytes on disk (ue8m0).

All arithmetic is on float32 bits, so no result depends on a platform's logarithm.

Next file to read: v4jax/quant/fp8.py.
"""

import numpy as np

_MANTISSA = np.uint32(0x7FFFFF)
_LOWEST = np.float32(2.0**-127)
"""The scale of byte 0. It is the only subnormal one, so its bits do not follow the others' rule."""


def power_of_two(amax: np.ndarray, largest: float) -> np.ndarray:
    """2^ceil(log2(amax / largest)), float32: the least power of two that brings amax into range.

    As in the official `fast_round_scale`, amax is multiplied by float32(1 / largest), and a
    mantissa that is not 0 raises the exponent by one. Example: amax 448 and 449 with largest 448
    give 1 and 2.

    Args:
      amax: float32, finite, and so large that the product is a normal number (callers clamp it, as
        the official code does).
    """
    bits = (np.asarray(amax, np.float32) * np.float32(1 / largest)).view(np.uint32)
    exponent = (bits >> np.uint32(23)) + ((bits & _MANTISSA) != 0).astype(np.uint32)
    return (exponent << np.uint32(23)).view(np.float32)


def to_ue8m0(scale: np.ndarray) -> np.ndarray:
    """ue8m0 bytes of scales: the biased exponents of powers of two, float32 -> uint8.

    Raises:
      ValueError: a scale is not a power of two in [2^-127, 2^127].
    """
    scale = np.asarray(scale, np.float32)
    bits = scale.view(np.uint32)
    lowest = scale == _LOWEST
    exponent = np.where(lowest, np.uint32(0), bits >> np.uint32(23))
    bad = ~lowest & (((bits & _MANTISSA) != 0) | (exponent < 1) | (exponent > 254))
    if bad.any():
        raise ValueError(
            f"scale: got {scale[bad].flat[0]}; must be a power of two in [2^-127, 2^127]"
        )
    return exponent.astype(np.uint8)


def from_ue8m0(byte: np.ndarray) -> np.ndarray:
    """Scales of ue8m0 bytes: uint8 -> float32 2^(byte - 127).

    Raises:
      ValueError: a byte is 255, which is NaN.
    """
    byte = np.asarray(byte, np.uint8)
    if byte.size and byte.max() == 255:
        raise ValueError(
            f"scale: got byte 255 (NaN) at {np.argwhere(byte == 255)[0].tolist()}; "
            "must be below 255"
        )
    return np.where(byte == 0, _LOWEST, (byte.astype(np.uint32) << np.uint32(23)).view(np.float32))


def check_float_scale(scale: np.ndarray) -> np.ndarray:
    """`scale` as float32, checked: the scales of -Base releases.

    Raises:
      ValueError: a scale is not positive or not finite.
    """
    scale = np.asarray(scale, np.float32)
    bad = ~(np.isfinite(scale) & (scale > 0))
    if bad.any():
        raise ValueError(
            f"scale: got {scale[bad].flat[0]} at {np.argwhere(bad)[0].tolist()}; "
            "must be positive, finite"
        )
    return scale


def check_finite(x: np.ndarray) -> None:
    """Checks that low-precision formats can hold x.

    Raises:
      ValueError: a number is not finite.
    """
    if not np.isfinite(x).all():
        raise ValueError(
            f"got {x[~np.isfinite(x)].flat[0]}; fp8 and MXFP4 hold finite numbers only"
        )
