"""Checks mesh, layout and batch against a target, and names the nearest choice that fits.

Next file to read: v4jax/planner/page.py.
"""

import itertools
import math

from sharding.mesh import parse_mesh
from sharding.rules import MESH_AXES, check_has_mesh, layout_for
from v4jax.planner.estimate import gigabytes
from v4jax.planner.hardware import Target, target_of
from v4jax.planner.request import Request
from v4jax.planner.search import factorings, impossible, search
from v4jax.planner.weights import cut_of, trained_weights
from v4jax.train.config import TrainConfig
from v4jax.train.step import check_batch


def checked(cfg: TrainConfig, request: Request) -> Target:
    """The target, checked against mesh, layout and batch.

    Raises:
      ValueError: they do not fit together; names the nearest mesh, batch or length that does.
    """
    check_has_mesh(cfg.layout, cfg.mesh)
    sizes = parse_mesh(cfg.mesh)
    devices = math.prod(sizes.values())
    target = target_of(request.target, devices)
    if target.devices != devices:
        raise ValueError(
            f"mesh has {devices} devices; target {request.target} has {target.devices}; "
            f"nearest mesh: {nearest_mesh(cfg, sizes, target.devices)}"
        )
    rules = layout_for(cfg.layout, sizes)
    try:
        check_batch(cfg, rules, sizes)
    except ValueError as error:
        raise ValueError(f"{error}; {_nearest_lengths(cfg, rules, sizes)}") from None
    return target


def nearest_mesh(cfg: TrainConfig, sizes: dict[str, int], devices: int) -> str:
    """The mesh of `devices` devices that is nearest to `sizes`, has its axes and can cut the model.

    Nearest means the smallest sum of |log(size ratio)| over the axes.
    """
    axes = [axis for axis in MESH_AXES if sizes[axis] > 1] or ["fsdp"]

    def away(guess):
        return sum(
            abs(math.log(size / sizes[axis])) for axis, size in zip(axes, guess, strict=True)
        )

    guesses = sorted(factorings(devices, len(axes)), key=away)
    works = (
        guess
        for guess in guesses
        if _cuts(cfg, dict.fromkeys(MESH_AXES, 1) | dict(zip(axes, guess, strict=True)))
    )
    best = next(works, guesses[0])
    return ",".join(f"{axis}={size}" for axis, size in zip(axes, best, strict=True))


def _cuts(cfg: TrainConfig, sizes: dict[str, int]) -> bool:
    if impossible(cfg, sizes):
        return False
    rules = layout_for(cfg.layout, sizes)
    try:
        for weight in trained_weights(cfg):
            cut_of(weight, rules, sizes)
    except ValueError:
        return False
    return True


def nearest_fit(cfg: TrainConfig, request: Request) -> str:
    """The fastest layout on the same devices that fits, or how many devices it takes."""
    target = target_of(request.target, math.prod(parse_mesh(cfg.mesh).values()))
    try:
        best = search(
            cfg, target.hardware, target.devices, request.what, request.fp8, request.released
        ).ranked[0]
    except ValueError as error:
        return str(error)
    layout = "" if best.layout == str(cfg.layout) else f"--layout {best.layout} "
    return f"{layout}--mesh {best.mesh} fits in {gigabytes(best.memory_bytes)}"


def _nearest_lengths(cfg: TrainConfig, rules, sizes) -> str:
    words = []
    for flag, value, name in (
        ("--batch", cfg.batch_size, "act_batch"),
        ("--seq", cfg.seq_len, "act_seq"),
    ):
        parts = math.prod(sizes[axis] for axis in rules.mesh_axes(name))
        if value % parts:
            words.append(f"{flag} {max(parts, round(value / parts) * parts)}")
    return "nearest: " + " ".join(itertools.chain(words))
