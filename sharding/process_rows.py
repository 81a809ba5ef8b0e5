"""Rows in, whole arrays out: what each of several processes gives and gets.

Next file to read: sharding/params.py.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding


def local_rows(sharding: Sharding, shape: tuple[int, ...]) -> list[int]:
    """The rows of a global array that this process's devices hold, in order.

    Example: data=2, expert=2 and tensor=2 on 2 processes of 4 devices; data and expert split 8
    rows. Process 0 has data=0, so it holds rows 0 to 3, each twice, because devices along tensor
    hold the same rows. With tensor=8 alone both processes hold all 8 rows.
    """
    places = sharding.addressable_devices_indices_map(shape).values()
    rows = [range(shape[0])[index[0]] for index in places if index is not None]
    return sorted({row for part in rows for row in part})


def from_rows(sharding: Sharding, local: np.ndarray, rows: Sequence[int], count: int) -> jax.Array:
    """The global array [count, ...] of which `local` has this process's `rows` (see local_rows)."""
    where = {row: i for i, row in enumerate(rows)}

    def part(index):
        picked = [where[row] for row in range(count)[index[0]]]
        return local[picked][(slice(None), *index[1:])]

    return jax.make_array_from_callback((count, *local.shape[1:]), sharding, part)


def gather(x, index: tuple[int, ...] = ()) -> np.ndarray:
    """x[index] as a NumPy array, bit for bit, wherever its parts lie. Every process calls it.

    Every process gets all of it. Only what is asked for moves: shards of this process are copied,
    and the bits of other processes are added to zeros.
    """
    if not isinstance(x, jax.Array):
        return np.asarray(x[index] if index else x)
    jax.block_until_ready(x)  # also parts that are not read here; sharding/processes.py says why
    shape = x.shape[len(index) :]
    whole = np.zeros(shape, x.dtype)
    for shard in x.addressable_shards:
        lead = [
            range(size)[part]
            for size, part in zip(x.shape, shard.index[: len(index)], strict=False)
        ]
        mine = shard.replica_id == 0 or x.is_fully_replicated
        if mine and all(i in held for i, held in zip(index, lead, strict=True)):
            data = np.asarray(shard.data)[
                tuple(i - held.start for i, held in zip(index, lead, strict=True))
            ]
            whole[shard.index[len(index) :]] = data
    return whole if x.is_fully_addressable or x.is_fully_replicated else sum_of_bits(whole)


def sum_of_bits(part: np.ndarray) -> np.ndarray:
    """Sum over processes of arrays that are zero wherever another process has something.

    It adds bits as integers, so it is exact for -0.0 and NaN too.
    """
    bits = np.atleast_1d(part).view(f"u{part.dtype.itemsize}")
    first_devices = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([first_devices[i] for i in range(jax.process_count())]), ("process",))
    split, everywhere = (
        NamedSharding(mesh, PartitionSpec("process")),
        NamedSharding(mesh, PartitionSpec()),
    )
    shape = (jax.process_count(), *bits.shape)
    parts = jax.make_array_from_callback(shape, split, lambda _: bits[None])
    with jax.set_mesh(mesh):
        total = jax.jit(_add, out_shardings=everywhere)(parts)
    return np.asarray(total.addressable_data(0)).view(part.dtype).reshape(part.shape)


def _add(parts: jax.Array) -> jax.Array:
    return parts.sum(0, dtype=parts.dtype)
