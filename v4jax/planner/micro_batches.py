"""The fewest micro-batches of a step that fit a device's memory.

Next file to read: v4jax/planner/search.py.
"""

import bisect
import dataclasses
import functools
import math
import os

import jax

from sharding.mesh import parse_mesh
from sharding.rules import layout_for
from v4jax.planner.estimate import USABLE, gigabytes, memory_of
from v4jax.planner.hardware import Hardware, hardware_of
from v4jax.train.config import TrainConfig
from v4jax.train.stages import stage_at

_PROFILES = {"cpu": "cpu", "tpu": "v5p", "gpu": "h100"}
"""Platform -> some profile of it."""


def least_micro_batches(
    cfg: TrainConfig, hardware: Hardware, has: float, what: str = "train", released: bool = False
) -> tuple[TrainConfig, float]:
    """(`cfg` with the fewest micro-batches that fit `has` bytes, the bytes that it then needs).

    It is a divisor of the rows of a device, from cfg.gradient_accumulation on (from 1 for "auto").
    If nothing fits, it is all of them.
    """
    if cfg.gradient_accumulation == "auto":
        cfg = dataclasses.replace(cfg, gradient_accumulation=1)
    sizes = parse_mesh(cfg.mesh)
    batch_axes = layout_for(cfg.layout, sizes).mesh_axes("act_batch")
    shards = math.prod(sizes[axis] for axis in batch_axes)

    @functools.cache
    def need(count: int) -> float:
        one = dataclasses.replace(cfg, gradient_accumulation=count)
        return memory_of(one, hardware, what, released)

    def fits(count: int) -> bool:
        return need(count) <= has

    first, rows = cfg.micro_batches, cfg.batch_size // shards
    counts = [n for n in range(first, rows + 1) if rows % n == 0] or [first]
    if what == "decode" or fits(first):
        return cfg, need(first)
    # More micro-batches never need more memory.
    place = bisect.bisect_left(counts, True, key=fits)
    count = counts[min(place, len(counts) - 1)]
    return dataclasses.replace(cfg, gradient_accumulation=count), need(count)


def chosen_micro_batches(
    cfg: TrainConfig, has: float | None = None, hardware: Hardware | None = None
) -> TrainConfig:
    """`cfg` with a number in place of gradient_accumulation="auto", for every stage.

    Args:
      has: bytes of a device that the run may use; None: those of this machine's devices.
      hardware: None: a profile of this machine's platform, on which alone memory in training
        depends.

    Raises:
      ValueError: even one row a device at a time does not fit.
    """
    if cfg.gradient_accumulation != "auto":
        return cfg
    hardware = hardware_of(_PROFILES[jax.default_backend()]) if hardware is None else hardware
    has = device_bytes() if has is None else has

    def number(view: TrainConfig) -> int:
        found, need = least_micro_batches(view, hardware, has)
        if need > has:
            raise ValueError(
                f"gradient_accumulation: auto: {found.micro_batches} micro-batches of "
                f"{found.batch_size // found.micro_batches} rows still need "
                f"{gigabytes(need)} a device, estimated; it has {gigabytes(has)}. More devices, "
                "or a layout that cuts more, would do (v4jax layout CONFIG --search)"
            )
        return found.micro_batches

    stages = []
    for stage in cfg.stages:
        view = dataclasses.replace(stage_at(cfg, stage.after), gradient_accumulation="auto")
        count = stage.gradient_accumulation or number(view)
        stages.append(dataclasses.replace(stage, gradient_accumulation=count))
    return dataclasses.replace(
        cfg, gradient_accumulation=number(dataclasses.replace(cfg, stages=())), stages=tuple(stages)
    )


def device_bytes() -> float:
    """Bytes that a program may use of one of this machine's devices.

    Simulated devices share the machine's memory.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return USABLE * stats["bytes_limit"]
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return USABLE * whole / jax.local_device_count()
