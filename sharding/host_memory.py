"""Arrays that lie in the host's memory between programs, and come to the device slice by slice.

Each device has its share of an array in the memory of its own host, so nothing crosses the network.

Next file to read: v4jax/train/step.py.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

HOST = "pinned_host"
"""JAX's name of the memory of the host that devices read and write by themselves."""
SLICE = 2**26
"""Bytes of an array in the host's memory that are on the device at once."""


def on_host(place: NamedSharding) -> NamedSharding:
    """`place`, cut over devices as before, in the host's memory."""
    return place.with_memory_kind(HOST)


def is_on_host(place) -> bool:
    """Whether arrays of the sharding `place` lie in the host's memory."""
    return place.memory_kind == HOST


def to_device(tree):
    """Inside a jitted function: every array of `tree` in the device's memory."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


def to_host(tree):
    """Inside a jitted function: every array of `tree` in the host's memory."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host), tree)


def slice_by_slice(
    f: Callable[[Any, jax.Array], tuple[Any, jax.Array]],
    away: Any,
    here: jax.Array,
    spec: PartitionSpec | None = None,
) -> tuple[Any, jax.Array]:
    """f(away, here), for `away` in the host's memory; one slice is on the device at a time.

    It is a loop, because XLA's scheduler fetches whatever it can as early as it can, everything at
    once, and ignores optimization barriers.

    Args:
      f: (tree of arrays, array) -> the same shapes and dtypes; it treats every element by itself.
      away: arrays in the host's memory, of the shape of `here`.
      here: an array on the device.
      spec: how all of them lie on the ambient mesh; None: on one device.

    Returns:
      f's result, its first part in the host's memory.
    """
    if spec is None:
        return _loop(f, away, here)
    local = jax.shard_map(
        lambda away, here: _loop(f, away, here), in_specs=(spec, spec), out_specs=(spec, spec)
    )
    return local(away, here)


def _loop(f, away, here: jax.Array):
    """`slice_by_slice` on one device."""
    parts = _parts(here)
    if parts == 1:
        away, here = f(to_device(away), here)
        return to_host(away), here
    size = len(here) // parts

    def cut(x: jax.Array, start: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, start, size)

    def put(x: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(x, part, start, 0)

    def body(i: jax.Array, carry):
        away, here = carry
        start = i * size
        new, out = f(to_device(jax.tree.map(lambda x: cut(x, start), away)), cut(here, start))
        away = jax.tree.map(lambda x, part: put(x, part, start), away, to_host(new))
        return away, put(here, out, start)

    return lax.fori_loop(0, parts, body, (away, here))


def _parts(x: jax.Array) -> int:
    """The fewest equal slices along the first axis that have at most SLICE bytes each.

    Slices of a matrix are whole tiles of a TPU, of 8 rows.
    """
    rows = len(x) if x.ndim > 2 else len(x) // 8 if x.ndim == 2 and len(x) % 8 == 0 else 1
    least = math.ceil(x.nbytes / SLICE)
    return next((n for n in range(least, rows + 1) if rows % n == 0), rows)


def check_host_memory(choice: str, why: str, devices: Iterable[Any]) -> None:
    """Refuses a choice that keeps arrays in memory that one of `devices` cannot address.

    Args:
      choice: the field and its value, as "remat: got 'offload'".
      why: what it keeps there, as "which keeps streams in".

    Raises:
      ValueError: names the choice, the platform, and the memories that it has.
    """
    for device in devices:
        kinds = [memory.kind for memory in device.addressable_memories()]
        if HOST not in kinds:  # GPUs to compile for, that are not there, name none
            raise ValueError(
                f"{choice}, {why} the host's memory ({HOST}); "
                f"{device.platform} has {'only ' + ', '.join(kinds) if kinds else 'none'}"
            )
