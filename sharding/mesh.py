"""A device mesh from a text such as "data=2,expert=4", on real devices or simulated CPU devices.

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
    """The size of every mesh axis, in mesh order; 1 where `spec` does not name the axis.

    Example: "expert=4,data=2" gives slice 1, data 2, fsdp 1, context 1, expert 4, tensor 1.

    Raises:
      ValueError: an unknown or repeated axis, or a size that is not a positive integer.
    """
    sizes = {}
    for part in (spec or "").replace(" ", "").split(","):
        if not part:
            continue
        axis, equals, size = part.partition("=")
        if not equals:
            raise ValueError(
                f"mesh: got {part!r} in {spec!r}; must look like data=2,expert=4; "
                f"axes: {', '.join(MESH_AXES)}"
            )
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
    """Asks JAX for `count` simulated CPU devices.

    It has no effect once JAX has started, nor on TPUs and GPUs. A count that the user has fixed
    (JAX_NUM_CPU_DEVICES or XLA_FLAGS) is left alone.
    """
    if not any(importlib.util.find_spec(name) for name in ("libtpu", "jax_plugins")):
        keep_freed_memory()
        # A program on one device runs in the thread that calls it, and takes its temporary memory
        # from that thread's heap, the only one that may hold blocks of any size.
        jax.config.update("jax_cpu_enable_async_dispatch", count > 1)
    fixed = "JAX_NUM_CPU_DEVICES" in os.environ or "host_platform_device_count" in os.environ.get(
        "XLA_FLAGS", ""
    )
    if count > 1 and not fixed:
        # Once JAX has started this fails, and make_mesh says whether there are enough devices.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def keep_freed_memory(one_heap: bool = False) -> None:
    """Tells glibc to keep memory that is freed, and not to return it to the kernel.

    XLA:CPU allocates its temporary memory again at every step, and the kernel must clear each new
    page (docs/reports/2026-11.md). Conversions allocate as much.

    Args:
      one_heap: whether all threads share one heap; otherwise each has its own, for blocks of up to
        64 MB. Call it before threads start. It does not suit XLA, whose thousands of blocks a step
        would be searched for in a heap that compiling has fragmented.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # Names of mallopt(3), with their numbers in malloc.h.
        arena_max, mmap_max, trim_threshold, top_pad = (-8, -4, -1, -2)
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
