"""Fake quantisation: numbers rounded to what a low-precision format can hold, in JAX.

The gradient passes unchanged. quant="official" rounds what the served model rounds
(docs/equations.md#low-precision), in training (QAT) and in scoring alike:
- Weights: fp8 in blocks of 128 x 128; routed experts MXFP4, 32 along their input. Turning MXFP4
  into fp8 under the same scale loses nothing, as e4m3 holds every e2m1 number.
- Inputs of those matrices, except of wo_a: fp8 in blocks of 128.
- Keys/values without their rope dims: fp8 in blocks of 64.
- Queries and keys of the indexer: MXFP4 after a Hadamard rotation.

The numbers equal those of v4jax/quant/fp8.py and v4jax/quant/mxfp4.py bit for bit
(tests/test_fake.py).

Shapes: I input features, O output features, H head dim.
Next file to read: v4jax/model/weights.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.config import CSA, ModelConfig
from v4jax.quant import fp8, mxfp4

QUANTS = ("none", "official")
KEY_BLOCK = 64
"""Dims of a key/value that share a scale (official `act_quant(kv, 64)`)."""


class Format(NamedTuple):
    """A floating-point format.

    Attributes:
      largest: the largest number.
      least_amax: the least magnitude that a block is taken to have.
      mantissa: bits of the mantissa.
      least_exponent: exponent of the smallest normal number.
    """

    largest: float
    least_amax: float
    mantissa: int
    least_exponent: int


E4M3 = Format(fp8.LARGEST, fp8.LEAST_AMAX, 3, -6)
E2M1 = Format(mxfp4.LARGEST, mxfp4.LEAST_AMAX, 1, 0)


def check_quant(cfg: ModelConfig, quant: str, parts: int = 1) -> None:
    """Checks that `quant` exists and that the official formats can hold the model's sizes.

    Args:
      parts: devices that an expert's hidden width is cut over; no block may be cut.

    Raises:
      ValueError: an unknown `quant`, or a size that does not divide into blocks.
    """
    if quant not in QUANTS:
        raise ValueError(f"quant: got {quant!r}; allowed: {', '.join(map(repr, QUANTS))}")
    if quant == "none":
        return
    for name in ("hidden_size", "moe_intermediate_size"):
        if getattr(cfg, name) % mxfp4.BLOCK:
            raise ValueError(
                f"{name}: got {getattr(cfg, name)}; quant 'official' needs "
                f"a multiple of {mxfp4.BLOCK} (MXFP4 experts)"
            )
    if parts > 1 and cfg.moe_intermediate_size // parts % fp8.BLOCK:
        raise ValueError(
            f"moe_intermediate_size: got {cfg.moe_intermediate_size} over {parts} devices; "
            f"quant 'official' needs a multiple of {fp8.BLOCK} on each"
        )
    dim = cfg.index_head_dim
    if CSA in cfg.compress_ratios and (dim % mxfp4.BLOCK or dim & (dim - 1)):
        raise ValueError(
            f"index_head_dim: got {dim}; quant 'official' needs "
            f"a power of two of at least {mxfp4.BLOCK} (Hadamard)"
        )


def fp8_weight(w_IO: jax.Array) -> jax.Array:
    """A matrix as released files hold it: e4m3, one scale per 128 x 128."""
    return _fake(E4M3, (fp8.BLOCK, fp8.BLOCK), w_IO)


def mxfp4_weight(w_IO: jax.Array) -> jax.Array:
    """Routed experts' matrices [..., I, O]: e2m1, one scale per 32 along the input."""
    return _fake(E2M1, (mxfp4.BLOCK, 1), w_IO)


def fp8_input(x: jax.Array) -> jax.Array:
    """Activations that enter a low-precision matrix: e4m3, one scale per 128 of the last axis."""
    return _fake(E4M3, (1, fp8.BLOCK), x)


def fp8_keys(kv: jax.Array, rope: int) -> jax.Array:
    """Keys/values [..., H] with all but the last `rope` dims in e4m3, one scale per 64."""
    return jnp.concatenate((_fake(E4M3, (1, KEY_BLOCK), kv[..., :-rope]), kv[..., -rope:]), axis=-1)


def mxfp4_rotated(x: jax.Array) -> jax.Array:
    """Hadamard rotation, H^-0.5 * x @ hadamard(H), then e2m1 with one scale per 32.

    The rotation of both q and k leaves their scores unchanged.
    """
    dim = x.shape[-1]
    turned = (
        jnp.dot(x.astype(jnp.float32), hadamard(dim), precision=jax.lax.Precision.HIGHEST)
        * dim**-0.5
    )
    return _fake(E2M1, (1, mxfp4.BLOCK), turned.astype(x.dtype))


def hadamard(dim: int) -> np.ndarray:
    """The Hadamard matrix, float32 [dim, dim], for a power of two.

    Its signs are (-1)^(number of bits that i and j have in common).
    """
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fake(form: Format, sizes: tuple[int, int], x: jax.Array) -> jax.Array:
    """`x` rounded to `form`, one scale per block of `sizes` in the last two axes.

    The last blocks may be partial.
    """
    *lead, rows, columns = x.shape
    pads = [-size % block for size, block in zip((rows, columns), sizes, strict=True)]
    x32 = jnp.pad(x.astype(jnp.float32), [(0, 0)] * len(lead) + [(0, pad) for pad in pads])
    blocks = x32.reshape(*lead, -1, sizes[0], x32.shape[-1] // sizes[1], sizes[1])
    amax = jnp.max(jnp.abs(blocks), axis=(-3, -1), keepdims=True)
    scale = power_of_two(jnp.maximum(amax, np.float32(form.least_amax)), form.largest)
    rounded = _round(form, jnp.clip(blocks / scale, -form.largest, form.largest)) * scale
    return rounded.reshape(x32.shape)[..., :rows, :columns].astype(x.dtype)


_fake.defvjp(lambda form, sizes, x: (_fake(form, sizes, x), None), lambda form, sizes, _, ct: (ct,))


def power_of_two(amax: jax.Array, largest: float) -> jax.Array:
    """2^ceil(log2(amax / largest)): `scales.power_of_two`, on the bits of float32."""
    bits = jax.lax.bitcast_convert_type(amax * np.float32(1 / largest), jnp.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return jax.lax.bitcast_convert_type(exponent << 23, jnp.float32)


def _round(form: Format, y: jax.Array) -> jax.Array:
    """y rounded to the nearest number of the format, ties to even.

    The step between numbers is 2^(exponent - mantissa bits). Written out because XLA may drop a
    conversion to a narrow type and back.
    """
    exponent = (jax.lax.bitcast_convert_type(jnp.abs(y), jnp.int32) >> 23) - 127
    step = jnp.maximum(exponent, form.least_exponent) - form.mantissa + 127
    step = jax.lax.bitcast_convert_type(step << 23, jnp.float32)
    return jnp.round(y / step) * step
