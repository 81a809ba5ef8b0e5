"""How the cache stores numbers as the served model does: fp8 keys/values and MXFP4 index keys.

The rotary dims of keys/values are bf16; scales are stored as exponents. Only numbers that
quant="official" has rounded (v4jax/quant/fake.py) are packed, so packing loses only what bf16 loses
of the rotary dims. Stored numbers are a plain array, or one of the NamedTuples here, whose arrays
all have the same leading axes.

Bytes in V4: 448 + 7 + 2*64 = 583 per key/value, 64 + 4 per index key.

Shapes: W width of keys/values, R rope dims, J index dims; `...` any leading axes.
Next file to read: v4jax/cache/layer.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.config import ModelConfig
from v4jax.quant import fp8, mxfp4
from v4jax.quant.fake import KEY_BLOCK, power_of_two

STORAGES = ("dtype", "official")
"""Arrays in the compute dtype, or packed as in the served model."""


class KeyRows(NamedTuple):
    """Packed keys/values.

    Attributes:
      code: e4m3 [..., W-R].
      scale: uint8 [..., (W-R)/64], exponents of the scales.
      rope: bf16 [..., R].
    """

    code: jax.Array
    scale: jax.Array
    rope: jax.Array


class IndexRows(NamedTuple):
    """Packed index keys.

    Attributes:
      code: uint8 [..., J/2], two e2m1 per byte, the even dim in the low bits.
      scale: uint8 [..., J/32], exponents of the scales.
    """

    code: jax.Array
    scale: jax.Array


Rows = jax.Array | KeyRows | IndexRows


def empty_keys(cfg: ModelConfig, lead: tuple[int, ...], dtype: jnp.dtype, storage: str) -> Rows:
    """Zeros for keys/values [*lead, W]."""
    if storage != "official":
        return jnp.zeros((*lead, cfg.head_dim), dtype)
    rope, plain = cfg.qk_rope_head_dim, cfg.head_dim - cfg.qk_rope_head_dim
    code, scale = (
        jnp.zeros((*lead, plain), jnp.float8_e4m3fn),
        jnp.zeros((*lead, -(-plain // KEY_BLOCK)), jnp.uint8),
    )
    return KeyRows(code, scale, jnp.zeros((*lead, rope), jnp.bfloat16))


def empty_index_keys(
    cfg: ModelConfig, lead: tuple[int, ...], dtype: jnp.dtype, storage: str
) -> Rows:
    """Zeros for index keys [*lead, J]."""
    dim = cfg.index_head_dim
    if storage != "official":
        return jnp.zeros((*lead, dim), dtype)
    return IndexRows(
        jnp.zeros((*lead, dim // 2), jnp.uint8), jnp.zeros((*lead, dim // mxfp4.BLOCK), jnp.uint8)
    )


def pack(like: Rows, x: jax.Array) -> Rows:
    """`x` as `like` stores it."""
    if isinstance(like, KeyRows):
        rope = like.rope.shape[-1]
        y, scale = _scaled(x[..., :-rope], KEY_BLOCK, fp8.LARGEST, fp8.LEAST_AMAX)
        return KeyRows(y.astype(jnp.float8_e4m3fn), scale, x[..., -rope:].astype(jnp.bfloat16))
    if isinstance(like, IndexRows):
        y, scale = _scaled(x, mxfp4.BLOCK, mxfp4.LARGEST, mxfp4.LEAST_AMAX)
        size = jnp.abs(y)
        code = jnp.where(size < 2, 2 * size, jnp.where(size < 4, size + 2, size / 2 + 4)).astype(
            jnp.uint8
        )
        code = code | (jnp.signbit(y).astype(jnp.uint8) << 3)
        return IndexRows(code[..., 0::2] | (code[..., 1::2] << 4), scale)
    return x.astype(like.dtype)


def unpack(rows: Rows, dtype: jnp.dtype) -> jax.Array:
    """The numbers, in `dtype`; a plain array is returned as is."""
    if isinstance(rows, KeyRows):
        plain = _unscaled(rows.code.astype(jnp.float32), rows.scale, KEY_BLOCK)
        return jnp.concatenate((plain.astype(dtype), rows.rope.astype(dtype)), axis=-1)
    if isinstance(rows, IndexRows):
        code = jnp.stack((rows.code & 15, rows.code >> 4), axis=-1).reshape(
            *rows.code.shape[:-1], -1
        )
        n = (code & 7).astype(jnp.float32)
        size = jnp.where(n < 4, n / 2, jnp.where(n < 6, n - 2, 2 * n - 8))
        return _unscaled(jnp.where(code >= 8, -size, size), rows.scale, mxfp4.BLOCK).astype(dtype)
    return rows


def as_kept(like: Rows, x: jax.Array) -> jax.Array:
    """`x` as it will be read back, so that a chunk sees its own tokens as later chunks do."""
    if not isinstance(like, KeyRows):
        return x
    rope = like.rope.shape[-1]
    return jnp.concatenate(
        (x[..., :-rope], jax.lax.reduce_precision(x[..., -rope:], 8, 7)), axis=-1
    )


def _scaled(x: jax.Array, block: int, largest: float, least: float) -> tuple[jax.Array, jax.Array]:
    """(x / scale, exponents of the scales uint8), one scale per block; the last may be partial."""
    x = x.astype(jnp.float32)
    blocks = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)]).reshape(
        *x.shape[:-1], -1, block
    )
    scale = power_of_two(jnp.maximum(jnp.max(jnp.abs(blocks), axis=-1), np.float32(least)), largest)
    y = (blocks / scale[..., None]).reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    return y, (jax.lax.bitcast_convert_type(scale, jnp.int32) >> 23).astype(jnp.uint8)


def _unscaled(y: jax.Array, exponent: jax.Array, block: int) -> jax.Array:
    """y times the scale of its block, float32."""
    scale = jax.lax.bitcast_convert_type(exponent.astype(jnp.int32) << 23, jnp.float32)
    return y * jnp.repeat(scale, block, axis=-1)[..., : y.shape[-1]]
