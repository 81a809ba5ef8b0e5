"""A device mesh from a string such as "data=2,expert=4", on real devices or on simulated CPU devices.

Next file to read: sharding/targets.py.
"""

import contextlib
import ctypes
import importlib.util
import math
import os
import platform

import jax
from jax.sharding import AxisType, Mesh

from sharding.rules import MESH_AXES


def parse_mesh(spec: str | None) -> dict[str, int]:
    """Axis sizes in mesh order, for example "expert=4,data=2" -> {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1}.

    Raises:
      ValueError: an unknown or repeated axis, or a size that is not a positive integer.
    """
    sizes = {}
    for part in (spec or "").replace(" ", "").split(","):
        if not part:
            continue
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES:
            raise ValueError(
                f"mesh: got axis {axis!r} in {spec!r}; allowed: {', '.join(MESH_AXES)}"
            )
        if axis in sizes:
            raise ValueError(f"mesh: axis {axis!r} stands twice in {spec!r}")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"mesh: got size {size!r} for axis {axis!r} in {spec!r}; must be a positive integer"
            )
        sizes[axis] = int(size)
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES}


def simulate_devices(count: int) -> None:
    """Asks for `count` simulated CPU devices; without effect once JAX has started, and on TPU and GPU.

    A count the user has fixed (JAX_NUM_CPU_DEVICES or XLA_FLAGS) is left alone.
    """
    if not any(importlib.util.find_spec(name) for name in ("libtpu", "jax_plugins")):
        keep_freed_memory()
        # On one device: its temporary memory then comes from the thread that calls it, whose heap is the one that may be of any size.
        jax.config.update("jax_cpu_enable_async_dispatch", count > 1)
    fixed = "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get(
        "XLA_FLAGS", ""
    )
    if count > 1 and not fixed:
        with contextlib.suppress(
            RuntimeError
        ):  # JAX has started already: make_mesh will say whether there are enough
            jax.config.update("jax_num_cpu_devices", count)


def keep_freed_memory(one_heap: bool = False) -> None:
    """Tells glibc to keep what is freed. XLA:CPU asks for its temporary memory anew at every step, and having the kernel clear 1 GB
    of new pages each time took a quarter of a step of benchmarks/train_step.py. Conversions allocate as much.

    one_heap: for all threads, which would else take heaps of their own, of up to 64 MB a block. Not for XLA, which asks for thousands of
    blocks a step: they would be looked for among all that compiling has left in pieces (a fifth of a step). Before threads start.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        arena_max, mmap_max, trim_threshold, top_pad = (
            -8,
            -4,
            -1,
            -2,
        )  # names of mallopt(3), numbers of malloc.h
        for option, value in (
            (arena_max, 1),
            (mmap_max, 0),
            (trim_threshold, 2**31 - 1),
            (top_pad, 2**28),
        ):
            if option != arena_max or one_heap:
                libc.mallopt(option, value)


def make_mesh(sizes: dict[str, int]) -> Mesh:
    """A mesh with Auto axes over the first devices.

    Raises:
      ValueError: the mesh needs more devices than there are.
    """
    need, have = math.prod(sizes.values()), jax.device_count()
    if need > have:
        shown = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
        raise ValueError(
            f"mesh {shown} needs {need} devices; {have} {jax.default_backend()} device(s) are there"
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=jax.devices()[:need],
    )
