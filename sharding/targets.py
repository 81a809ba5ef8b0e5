"""Meshes of accelerators that this machine lacks: TPU slices and clusters of GPUs to compile for.

Next file to read: sharding/params.py.
"""

import importlib.util
import math
import os
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

NODE = 8
"""GPUs of one host, which NVLink joins, as in a DGX or HGX H100 or H200."""

_PLUGINS = {"tpu": "libtpu", "gpu": "jax_cuda13_plugin"}
"""Extra -> the package of its that has the compiler."""

# What a Hopper GPU tells CUDA about itself (openxla/xla, specs/h100_sxm.txtpb and h200.txtpb).
_HOPPER = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "shared_memory_per_core": 233472,
    "threads_per_core_limit": 2048,
    "core_count": 132,
    "fpus_per_core": 128,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "l2_cache_size": 52428800,
    "clock_rate_ghz": 1.98,
    "shared_memory_per_block_optin": 232448,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}


class _Memory(NamedTuple):
    """In what Hopper GPUs differ; bytes, and bytes per second."""

    name: str
    size: int
    bandwidth: int


GPUS = {
    "h100": _Memory("NVIDIA H100 80GB HBM3", 84978434048, 3352320000000),
    "h200": _Memory("NVIDIA H200 141GB HBM3e", 151397597184, 4800000000000),
}
"""GPUs to compile for, by the names of v4jax/planner/hardware.json."""


def gpu_of(target: str) -> str:
    """The GPU that a target such as "h100:64" names, of GPUS; "" for any other target."""
    name, colon, _ = target.partition(":")
    return name if colon and name in GPUS else ""


def check_target(target: str) -> None:
    """Refuses a target that this environment cannot compile for.

    Args:
      target: as of `topology_mesh`, or "cpu", which needs nothing.

    Raises:
      ValueError: its extra (`tpu` or `gpu`) is not installed, or GPUs fill no hosts.
    """
    if target == "cpu":
        return
    if gpu_of(target):
        _check_gpus(target)
    extra = "gpu" if gpu_of(target) else "tpu"
    if importlib.util.find_spec(_PLUGINS[extra]) is None:
        raise ValueError(
            f"target: compiling for {target!r} needs the extra `{extra}`: pip install "
            f"'v4jax[{extra}]'; estimates do not (--paper, or --search without --confirm)"
        )


def _check_gpus(target: str) -> None:
    name, _, count = target.partition(":")
    if not count.isdecimal() or int(count) < 1 or (int(count) > NODE and int(count) % NODE):
        raise ValueError(
            f"target: got {target!r}; must be {name}:N with N up to {NODE}, or a multiple of "
            f"{NODE} (GPUs of a host)"
        )


def topology_mesh(target: str, sizes: dict[str, int]) -> Mesh:
    """A mesh of devices to compile for.

    Args:
      target: TPU chips, as "v5p:4x4x8", "v6e:16x16" or "tpu7x:4x4x8", or GPUs, as "h100:64" or
        "h200:16".
      sizes: mesh axis -> size.

    Raises:
      ValueError: an unknown target, one whose extra (`tpu` or `gpu`) is not installed, or a mesh
        with another number of devices.
    """
    devices = _gpus(target) if gpu_of(target) else tpu_devices(target)
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh has {math.prod(sizes.values())} devices; target {target} has {len(devices)}"
        )
    if gpu_of(target):  # outer axes across hosts, inner ones within
        placed = np.array(devices).reshape(tuple(sizes.values()))
    else:
        placed = mesh_utils.create_device_mesh(
            tuple(sizes.values()), devices, allow_split_physical_axes=True
        )
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def tpu_devices(target: str) -> list[Any]:
    check_target(target)
    # libtpu asks a metadata server unless it is told who it is, and locks itself to one process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=target).devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise ValueError(f"target: libtpu does not know {target!r}: {error}") from None


def _gpus(target: str) -> list[Any]:
    check_target(target)
    name, _, count = target.partition(":")
    hosts, each = max(int(count) // NODE, 1), min(int(count), NODE)
    return list(
        topologies.get_topology_desc(
            platform="cuda", topology=f"1x{hosts}x{each}", target_config=_description(GPUS[name])
        ).devices
    )


def _description(gpu: _Memory) -> str:
    """The GPU as XLA's GpuTargetConfigProto, in text."""
    figures = _HOPPER | {"memory_bandwidth": gpu.bandwidth, "device_memory_size": gpu.size}
    return (
        "gpu_device_info { cuda_compute_capability { major: 9 } "
        + " ".join(f"{name}: {value}" for name, value in figures.items())
        + ' } platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 }'
        f' device_description_str: "{gpu.name}"'
    )
