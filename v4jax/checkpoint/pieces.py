"""Puts an array on its devices piece by piece, so that the host never holds more than a piece.

Next file to read: v4jax/checkpoint/load_shards.py.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import SingleDeviceSharding

PIECE_BYTES = 2**28
"""Bytes of a piece, unless one matrix is larger."""
Block = tuple[range, ...]
"""A part of an array: along each axis, which indices."""


def place_in_pieces(
    shape: tuple[int, ...],
    dtype: Any,
    sharding: Any,
    read: Callable[[Block], np.ndarray],
    piece_bytes: int = PIECE_BYTES,
) -> jax.Array:
    """An array whose parts `read` returns, on the devices of this process.

    A device's part is cut along its leading axes (layers, experts), never within a matrix. Devices
    that hold the same part get it from one reading. The host holds one piece at a time (on CPUs
    the devices' parts too).

    Args:
      read: returns a block of the array.
      piece_bytes: the largest piece, where a matrix is no larger.
    """
    devices: dict[Block, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        block = tuple(range(size)[cut] for size, cut in zip(shape, index, strict=True))
        devices.setdefault(block, []).append(device)
    shards: list[jax.Array] = []
    for block, holders in devices.items():
        shards += _fill(block, jnp.dtype(dtype), holders, read, piece_bytes)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _fill(block: Block, dtype, holders: list[Any], read, piece_bytes: int) -> list[jax.Array]:
    """The block on each of its holders."""
    pieces = list(_pieces(block, dtype.itemsize, piece_bytes))
    if len(pieces) == 1:
        array = read(block)
        return [jax.device_put(array, device) for device in holders]
    shape = tuple(len(part) for part in block)
    shards = [_zeros(shape, dtype, SingleDeviceSharding(device)) for device in holders]
    for piece in pieces:
        array = read(piece)
        start = tuple(own.start - whole.start for own, whole in zip(piece, block, strict=True))
        shards = [
            _written(shard, jax.device_put(array, device), start)
            for shard, device in zip(shards, holders, strict=True)
        ]
        jax.block_until_ready(shards)  # or pieces would pile up
    return shards


def _pieces(block: Block, itemsize: int, limit: int) -> Iterator[Block]:
    """The block, cut along its leading axes into pieces of at most `limit` bytes.

    Example: 3 layers of 4 matrices of 2 bytes in pieces of 4 bytes: two matrices at a time.
    """
    if math.prod(len(part) for part in block) * itemsize <= limit:
        yield block
        return
    for axis in range(len(block) - 2):
        one = math.prod(len(part) for part in block[axis + 1 :]) * itemsize
        if len(block[axis]) > 1:
            count = max(1, limit // one)
            for first in range(0, len(block[axis]), count):
                cut = (*block[:axis], block[axis][first : first + count], *block[axis + 1 :])
                yield from _pieces(cut, itemsize, limit)
            return
    yield block


def _zeros(shape, dtype, place) -> jax.Array:
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=place)()


@functools.partial(jax.jit, donate_argnums=0)
def _written(shard: jax.Array, piece: jax.Array, start: tuple[int, ...]) -> jax.Array:
    return lax.dynamic_update_slice(shard, piece, start)
