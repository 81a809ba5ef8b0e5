"""Weights as released files hold them, on the device: fp8 with block scales, MXFP4; read in JAX.

A `Packed` takes the place of an array in the parameter tree. It lies there as [in, out], as all
matrices do, and is read where the model uses it, layer by layer. Its numbers are those of
v4jax/quant/fp8.py and v4jax/quant/mxfp4.py, rounded to bfloat16 as `v4jax.load` would.

An MXFP4 byte holds two numbers of one block of 32 inputs: number k in its low half and number 16+k
in its high half, k from 0 to 15. (Files put neighbours into a byte; `bytes_by_halves` rearranges
them.) So the two halves of a block come out as whole rows, which need no shuffling.

Shapes: I input features, O output features, P and Q blocks along I and O; `...` layers, experts.
Next file to read: v4jax/checkpoint/export.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from v4jax.quant import fp8, mxfp4

HALF = mxfp4.BLOCK // 2
LEAST_SCALE, LARGEST_SCALE = 2, 252
"""ue8m0 bytes of MXFP4 scales for which every product is a normal bfloat16."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("codes", "scale"), meta_fields=("format",)
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """A matrix, or a stack of them, in low precision.

    Attributes:
      codes: uint8. fp8: e4m3 bytes [..., I, O]. mxfp4: two numbers a byte [..., I/2, O].
      scale: fp8: float32 [..., P, Q], blocks of 128 x 128, the last ones partial. mxfp4: ue8m0
        bytes, uint8 [..., I/32, O].
      format: "fp8" or "mxfp4".

    Trees of shapes, of axes or of shardings hold those in place of the two arrays.
    """

    codes: Any
    scale: Any
    format: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its numbers."""
        *lead, rows, width = self.codes.shape
        return (*lead, rows * 2 if self.format == "mxfp4" else rows, width)

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    def numbers(self, dtype) -> jax.Array:
        """Its numbers [..., I, O] in `dtype`, rounded to bfloat16 before."""
        read = _mxfp4_numbers if self.format == "mxfp4" else _fp8_numbers
        return read(self.codes, self.scale).astype(dtype)


def as_numbers(w: "jax.Array | Packed", dtype) -> jax.Array:
    """The numbers of a weight in `dtype`, whether it is packed or not."""
    return w.numbers(dtype) if isinstance(w, Packed) else w.astype(dtype)


def is_packed(tree) -> bool:
    """Whether any weight of a tree of parameters is packed."""
    found = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Packed))
    return any(isinstance(leaf, Packed) for leaf in found)


def _fp8_numbers(codes: jax.Array, scale: jax.Array) -> jax.Array:
    """float32 [..., I, O], each rounded to bfloat16."""
    *lead, rows, width = codes.shape
    pads = [(0, 0)] * len(lead) + [(0, -size % fp8.BLOCK) for size in (rows, width)]
    whole = jnp.pad(_fp8_values(codes), pads)
    blocks = whole.reshape(*lead, scale.shape[-2], fp8.BLOCK, -1, fp8.BLOCK)
    product = blocks * scale[..., :, None, :, None]
    whole = product.reshape(*lead, rows + pads[-2][1], width + pads[-1][1])
    # XLA may drop a conversion to bfloat16 and back.
    return lax.reduce_precision(whole[..., :rows, :width], exponent_bits=8, mantissa_bits=7)


def _fp8_values(codes: jax.Array) -> jax.Array:
    """float32 numbers of e4m3 bytes, put together from their bits.

    XLA's own conversion takes twice as long on CPUs. A byte has a sign, four bits of exponent with
    bias 7 and three of mantissa; below exponent 1 numbers are m / 2^9, and 127 is not a number.
    """
    byte = codes.astype(jnp.int32)
    size = byte & 127
    subnormal = size.astype(jnp.float32) * 2.0**-9
    normal = lax.bitcast_convert_type((size << 20) + ((127 - 7) << 23), jnp.float32)
    value = jnp.where(size < 8, subnormal, jnp.where(size == 127, jnp.nan, normal))
    sign = (byte & 128) << 24
    return lax.bitcast_convert_type(lax.bitcast_convert_type(value, jnp.int32) | sign, jnp.float32)


def _mxfp4_numbers(codes: jax.Array, scale: jax.Array) -> jax.Array:
    """bfloat16 [..., I, O], put together from the bits of code and scale.

    Of a code 8 is the sign. The numbers of 2 to 7 are (1 + code % 2 / 2) 2^(code // 2 - 1); those
    of 0 and 1 are 0 and 0.5. A bfloat16 has its exponent, biased like ue8m0, above 7 bits of
    mantissa.
    """
    *lead, rows, width = codes.shape
    byte = codes.reshape(*lead, -1, 1, HALF, width).astype(jnp.uint16)
    shift = jnp.array([0, 4], jnp.uint16).reshape(*(1,) * len(lead), 1, 2, 1, 1)
    # Halves are computed, not concatenated: XLA:CPU fuses a concatenation badly.
    code = byte >> shift & 15
    size = code & 7
    exponent = (scale.astype(jnp.uint16)[..., :, None, None, :] - 1) << 7
    bits = jnp.where(size == 0, 0, (jnp.where(size == 1, 0, size) << 6) + exponent)
    bits = bits | (code & 8) << 12
    return lax.bitcast_convert_type(bits, jnp.bfloat16).reshape(*lead, rows * 2, width)


def mxfp4_exponent(scale: jax.Array) -> jax.Array:
    """What `mxfp4_value` takes of a block's scale: int32 of a ue8m0 byte."""
    return (scale.astype(jnp.int32) - 1) << 23


def mxfp4_value(code: jax.Array, exponent: jax.Array) -> jax.Array:
    """float32 numbers of 4-bit codes; kernels read them with it.

    Args:
      code: int32; bits above the lowest four may be anything.
      exponent: that of each code's block, int32 in the shape of `code`.
    """
    size = code & 7
    bits = jnp.where(size == 0, 0, (jnp.where(size == 1, 0, size) << 22) + exponent)
    return lax.bitcast_convert_type(bits | (code & 8) << 28, jnp.float32)


def halves_of_inputs(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inputs [..., I] of the low and of the high halves of MXFP4 bytes, [..., I/2] each.

    Example: of 64 inputs, 0 to 15 and 32 to 47 are those of the low halves.
    """
    blocks = x.reshape(*x.shape[:-1], -1, 2, HALF)
    low, high = (blocks[..., n, :].reshape(*x.shape[:-1], -1) for n in range(2))
    return low, high


def bytes_by_halves(packed: np.ndarray) -> np.ndarray:
    """MXFP4 bytes of a file [O, I/2], neighbours in a byte -> numbers k and 16+k in a byte, uint8.

    Example: of the block 0, 1, 2, ..., 31 the first byte of a file has 0 and 1; here 0 and 16.
    """
    first, second = np.split(packed.view(np.uint8).reshape(len(packed), -1, HALF), 2, axis=-1)
    even = first & np.uint8(15) | second << np.uint8(4)
    odd = first >> np.uint8(4) | second & np.uint8(240)
    return np.stack((even, odd), axis=-1).reshape(packed.shape)


def check_scales(packed: Callable[[], np.ndarray], scale: np.ndarray) -> None:
    """Refuses MXFP4 numbers that no normal bfloat16 holds.

    Args:
      packed: returns the bytes of a file [O, I/2]; called where a scale is unusual.
      scale: ue8m0 bytes [O, I/32].

    Raises:
      ValueError: such a scale, where some number of its block is not 0.
    """
    outside = (scale < LEAST_SCALE) | (scale > LARGEST_SCALE)
    if not outside.any():
        return
    blocks = packed().view(np.uint8).reshape(*scale.shape, HALF)[outside]
    used = (blocks & np.uint8(0x77)).any(axis=-1)
    if used.any():
        raise ValueError(
            f"scale: got byte {scale[outside][used][0]} of a block that is not all 0; packed "
            f"weights need {LEAST_SCALE} to {LARGEST_SCALE}; load it as bfloat16"
        )
