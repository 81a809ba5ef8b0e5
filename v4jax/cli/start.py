"""Prepares devices before JAX is used.

Next file to read: sharding/processes.py.
"""

import math


def start(mesh: str | None, preemptible: bool = False) -> None:
    """Simulates devices where that is allowed, and joins the job that the environment describes."""
    from sharding.mesh import parse_mesh, simulate_devices
    from sharding.processes import start

    simulate_devices(math.prod(parse_mesh(mesh).values()))
    start(preemptible)
