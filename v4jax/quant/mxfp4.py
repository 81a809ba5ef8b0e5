"""MXFP4: e2m1 numbers, two to a byte, with one power-of-two scale for 32 of a row: routed experts of released files.

Legend: O output features, I input features, H = I / 2 bytes, Q = I / 32 blocks.

Next file to read: v4jax/checkpoint/names.py.
"""

import ml_dtypes
import numpy as np

from v4jax.quant.scales import check_finite, power_of_two

E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
BLOCK = 32
LARGEST = 6.0
_BAND = 2**16
"""Numbers worked on at a time, so that what is between steps stays in the cache."""
LEAST_AMAX = 6 * 2.0**-126
"""Official fp4_act_quant: a block has at least this magnitude, so its scale is a normal number."""

_VALUE = np.arange(16, dtype=np.uint8).view(E2M1).astype(np.float32)  # 0 .5 1 1.5 2 3 4 6, then their negatives
_PAIR = np.stack([np.tile(_VALUE, 16), np.repeat(_VALUE, 16)], axis=1).view(np.uint64)[:, 0]
"""The two float32 of a byte, low nibble first, as 8 bytes: one look-up gives both."""


def scale_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """[O, Q] of a matrix [O, I].

    Raises:
      ValueError: I is not a multiple of 32.
    """
    if shape[1] % BLOCK:
        raise ValueError(f"MXFP4: got {shape[1]} input features; must be a multiple of {BLOCK}")
    return shape[0], shape[1] // BLOCK


def pack(code_OI: np.ndarray) -> np.ndarray:
    """Codes 0 to 15, uint8 [O, I] -> int8 [O, H]; the low nibble is the even column (official convert.py)."""
    return (code_OI[:, 0::2] | (code_OI[:, 1::2] << np.uint8(4))).view(np.int8)


def unpack(packed_OH: np.ndarray) -> np.ndarray:
    """int8 [O, H] -> codes 0 to 15, uint8 [O, I]."""
    byte_OH = packed_OH.view(np.uint8)
    return np.stack([byte_OH & np.uint8(15), byte_OH >> np.uint8(4)], axis=-1).reshape(len(byte_OH), -1)


def block_scale(x_OI: np.ndarray) -> np.ndarray:
    """2^ceil(log2(max |x| / 6)) of each 32 of a row, float32 [O, Q]."""
    amax_OQ = np.abs(x_OI).reshape(scale_shape(x_OI.shape) + (BLOCK,)).max(axis=-1)
    return power_of_two(np.maximum(amax_OQ, np.float32(LEAST_AMAX)), LARGEST)


def quantise(x_OI: np.ndarray, scale_OQ: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(int8 [O, H], scale float32 [O, Q]): x / scale, saturated at 6, rounded to nearest even, packed.

    Raises:
      ValueError: x that is not finite; I that is not a multiple of 32.
    """
    rows, blocks = scale_shape(x_OI.shape)
    packed_OH, found_OQ = np.empty((rows, x_OI.shape[1] // 2), np.int8), np.empty((rows, blocks), np.float32)
    band = max(1, _BAND // max(1, x_OI.shape[1]))
    for some in (slice(row, row + band) for row in range(0, rows, band)):
        x = x_OI[some]
        check_finite(x)
        found_OQ[some] = block_scale(x) if scale_OQ is None else scale_OQ[some]
        packed_OH[some] = pack(codes((x.reshape(-1, blocks, BLOCK) / found_OQ[some, :, None]).reshape(x.shape)))
    return packed_OH, found_OQ


def codes(y: np.ndarray) -> np.ndarray:
    """Codes 0 to 15 of float32 numbers, rounded to nearest even and saturated: how many of the seven midpoints lie below, and the sign.
    A cast to ml_dtypes' float4 gives the same, number by number; comparisons run over many at once."""
    magnitude = np.abs(y)
    code = (y.view(np.uint32) >> np.uint32(28)).astype(np.uint8) & np.uint8(8)
    for low, high in ((0.25, 0.75), (1.25, 1.75), (2.5, 3.5)):  # a tie goes to the even code: down at the first, up at the second
        code += (magnitude > np.float32(low)).view(np.uint8)
        code += (magnitude >= np.float32(high)).view(np.uint8)
    return code + (magnitude > np.float32(5)).view(np.uint8)


def dequantise(packed_OH: np.ndarray, scale_OQ: np.ndarray) -> np.ndarray:
    """float32 [O, I]: code times its block's scale, exact.

    Raises:
      ValueError: a product that float32 cannot hold.
    """
    rows, half = packed_OH.shape
    x_OI = _PAIR[packed_OH.view(np.uint8)].view(np.float32)
    blocks_OQ = x_OI.reshape(scale_shape((rows, 2 * half)) + (BLOCK,))
    with np.errstate(over="ignore"):
        blocks_OQ *= scale_OQ[..., None]
    if scale_OQ.size and scale_OQ.max() > np.finfo(np.float32).max / LARGEST:
        check_finite(x_OI)
    return x_OI
