"""Arrays that lie in the host's memory between programs, and the moves inside a program.

Each device has its share of an array in the memory of its own host, so nothing crosses the network.

Next file to read: v4jax/train/step.py.
"""

from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import NamedSharding

HOST = "pinned_host"
"""JAX's name of the memory of the host that devices read and write by themselves."""


def on_host(place: NamedSharding) -> NamedSharding:
    """`place`, cut over devices as before, in the host's memory."""
    return place.with_memory_kind(HOST)


def is_on_host(place) -> bool:
    """Whether arrays of the sharding `place` lie in the host's memory."""
    return place.memory_kind == HOST


def to_device(tree):
    """Inside a jitted function: every array of `tree` in the device's memory."""
    return _moved(tree, jax.memory.Space.Device)


def to_host(tree):
    """Inside a jitted function: every array of `tree` in the host's memory, except scalars."""
    return _moved(tree, jax.memory.Space.Host)


def _moved(tree, space: jax.memory.Space):
    """XLA moves each array when it is needed, not the tree at once."""
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, tree)


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
        if HOST not in kinds:
            raise ValueError(
                f"{choice}, {why} the host's memory ({HOST}); "
                f"{device.platform} has only {', '.join(kinds)}"
            )
