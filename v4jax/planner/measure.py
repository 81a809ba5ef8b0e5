"""Measures this machine as a hardware profile: its rates of products, copies and exchanges.

    v4jax layout --measure cpu.json

All simulated devices share the cores, so the figures are of all of them together (`shared`). They
are rates that were reached, so no share is taken off them.

Shapes: A rows, Z columns of a matrix.

Next file to read: v4jax/planner/hardware.py.
"""

import os
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from sharding.mesh import make_mesh, parse_mesh

SIDE = 1024
"""Side of the matrices that are multiplied: too large for caches, yet measured in a second."""


def measure(devices: int = 8) -> dict[str, Any]:
    """An entry like those of hardware.json, with `shared` set. It takes seconds."""
    mesh = make_mesh(parse_mesh(f"data={devices}"))
    with jax.set_mesh(mesh):
        product = _seconds(_everywhere(mesh, lambda a_AZ: a_AZ @ a_AZ), (devices * SIDE, SIDE))
        copied = _seconds(_everywhere(mesh, lambda a_AZ: a_AZ + 1), (devices * 4 * SIDE, SIDE))
        moved = _seconds(_everywhere(mesh, _exchange), (devices * 4 * SIDE, SIDE))
        started = _seconds(_everywhere(mesh, _many_sums), (devices * 8, 8)) / _SUMS
    whole = devices * 4 * SIDE * SIDE * 4
    rate = 2 * SIDE**3 * devices / product
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sent = whole * (devices - 1) / devices
    text = (
        f"measured by `v4jax layout --measure` on {os.cpu_count()} cores "
        f"({platform.processor() or platform.machine()}), jax {jax.__version__}"
    )
    return {
        "name": "this machine's CPU",
        "bf16_flops": rate,
        "fp8_flops": rate,
        "hbm_bytes": float(memory),
        "hbm_bandwidth": 2 * whole / copied,
        "tiers": [{"bandwidth": sent / moved}],
        "latency": started,
        "matmul": 1.0,
        "memory": 1.0,
        "network": 1.0,
        "overlap": 0.0,
        "shared": True,
        "sources": {"all": text},
    }


_SUMS = 20


def _many_sums(a_AZ):
    """A chain of small exchanges, each of which waits for the one before."""
    return lax.fori_loop(0, _SUMS, lambda _, a_AZ: lax.pmean(a_AZ, "data") + 1, a_AZ)


def _exchange(a_AZ):
    return lax.all_to_all(a_AZ, "data", 0, 0, tiled=True)


def _everywhere(mesh, f: Callable) -> Callable:
    """`f` on every device's own rows, jitted."""
    return jax.jit(
        jax.shard_map(
            f,
            mesh=mesh,
            in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec("data"),
            check_vma=False,
        )
    )


def _seconds(f: Callable, shape: tuple[int, int], times: int = 5) -> float:
    """Seconds of the fastest run, after one to warm up."""
    a_AZ = jnp.ones(shape, jnp.float32)
    took = []
    for _ in range(times + 1):
        start = time.perf_counter()
        jax.block_until_ready(f(a_AZ))
        took.append(time.perf_counter() - start)
    return min(took[1:])
