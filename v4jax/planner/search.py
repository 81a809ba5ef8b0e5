"""Searches layouts and meshes for a number of chips: estimates all, and rejects with a reason.

Each gets the fewest micro-batches that fit, with each remat policy that is asked for. Meshes are
all factorings of the device count over the axes that a layout uses, as far as the model can be cut:
`tensor` at most the output groups, `context` no shorter than a window. `slice` is left out. Layouts
are ranked by estimated step time. The front is every layout that no other beats in both memory and
time.

Next file to read: v4jax/planner/compiled.py.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from sharding.rules import LAYOUTS, MESH_AXES, AxisRules
from v4jax.planner.estimate import USABLE, Estimate, estimate, gigabytes
from v4jax.planner.hardware import Hardware
from v4jax.planner.micro_batches import least_micro_batches
from v4jax.remat import POLICIES
from v4jax.train.config import TrainConfig
from v4jax.train.step import check_batch

SHOWN = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found: the estimates that fit, fastest first, and why the others were rejected.

    Attributes:
      front: those of `ranked` that no other beats in both memory and time.
      rejected: reason -> how many.
      tried: how many were estimated.
    """

    ranked: tuple[Estimate, ...]
    front: tuple[Estimate, ...]
    rejected: dict[str, int]
    tried: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "tried": self.tried,
            "rejected": self.rejected,
            "why": self.why(),
            "ranked": [found.to_dict() for found in self.ranked[:SHOWN]],
            "front": [found.to_dict() for found in self.front],
        }

    def rows(self) -> list[tuple[str, str, str, str]]:
        """A table for people."""
        rows = [("tried", f"{self.tried} layouts", f"{len(self.ranked)} fit", "")]
        rows += [("rejected", reason, str(count), "") for reason, count in self.rejected.items()]
        rows += [
            (
                f"{i + 1}.",
                f"{e.layout}: {e.mesh}{_times(e)}",
                f"{e.step_seconds:.3f} s, {e.bound}",
                f"{gigabytes(e.memory_bytes)}, MFU {e.mfu:.1%}",
            )
            for i, e in enumerate(self.ranked[:SHOWN])
        ]
        return rows + [
            (
                "front",
                f"{e.layout}: {e.mesh}{_times(e)}",
                f"{e.step_seconds:.3f} s",
                gigabytes(e.memory_bytes),
            )
            for e in self.front[:SHOWN]
        ]

    def why(self) -> str:
        """A sentence that says why the first of the ranking is first."""
        if not self.ranked:
            return "nothing fits"
        best = self.ranked[0]
        text = (
            f"{best.layout} on {best.mesh} is bound by {best.bound} "
            f"and spends {best.exchange_seconds:.3f} s in exchanges"
        )
        other = next((e for e in self.ranked if e.layout != best.layout), None) or next(
            (e for e in self.ranked if e != best), None
        )
        if other is None:
            return text + "; nothing else fits"
        costs = {
            part: other.parts[part][2] - best.parts.get(part, (0, 0, 0))[2] for part in other.parts
        }
        costs["exchanges"] = other.exchange_seconds - best.exchange_seconds
        worst = max(costs, key=lambda part: costs[part])
        return text + (
            f"; {other.layout} on {other.mesh} takes "
            f"{other.step_seconds / best.step_seconds:.2f} times as long, most of all for "
            f"{worst} ({costs[worst] * 1e3:+.0f} ms)"
        )


def _times(found: Estimate) -> str:
    times = f", {found.micro_batches} micro-batches" if found.micro_batches > 1 else ""
    return times + (f", remat {found.remat}" if found.remat else "")


def policies_of(cfg: TrainConfig, hardware: Hardware, what: str) -> tuple[str, ...]:
    """The remat policies worth a search, that of `cfg` first.

    "offload" needs memory of the host beside that of the device.
    """
    if what == "decode":
        return (cfg.remat,)
    named = [name for name in POLICIES if name != "offload" or not hardware.shared]
    return (cfg.remat, *(name for name in named if name != cfg.remat))


def search(
    cfg: TrainConfig,
    hardware: Hardware,
    devices: int,
    what: str = "train",
    fp8: bool = False,
    released: bool = False,
    policies: tuple[str, ...] = (),
) -> Found:
    """Ranks every layout of `cfg`'s model, length and batch on `devices` devices.

    Args:
      policies: remat policies to try; none: that of `cfg`.

    Raises:
      ValueError: nothing fits; names what comes closest and how many devices would do.
    """
    rejected: collections.Counter[str] = collections.Counter()
    fits: list[Estimate] = []
    closest: tuple[float, TrainConfig] | None = None
    tried = 0
    pairs = itertools.product(candidates(cfg, devices, rejected), policies or (cfg.remat,))
    for (layout, mesh), policy in pairs:
        tried += 1
        one = dataclasses.replace(cfg, mesh=mesh, layout=layout, remat=policy)
        has = USABLE * hardware.of_a_device(devices).hbm_bytes
        try:
            one, need = least_micro_batches(one, hardware, has, what, released)
        except ValueError as error:
            rejected[_reason(str(error))] += 1
            continue
        if need <= has:
            fits.append(estimate(one, hardware, what, fp8, released))
            continue
        rejected["needs more memory than a device has"] += 1
        closest = min(closest or (need, one), (need, one), key=lambda pair: pair[0])
    if not fits:
        raise ValueError(_nothing(cfg, devices, hardware, closest, rejected))
    fits.sort(key=lambda e: (e.step_seconds, e.memory_bytes))
    return Found(
        ranked=tuple(fits), front=front(fits), rejected=dict(rejected.most_common()), tried=tried
    )


def as_estimated(cfg: TrainConfig, found: Estimate) -> TrainConfig:
    """`cfg` with mesh, layout, micro-batches and remat of one of its search's estimates."""
    layout = cfg.layout if found.layout == str(cfg.layout) else found.layout
    return dataclasses.replace(
        cfg,
        mesh=found.mesh,
        layout=layout,
        gradient_accumulation=found.micro_batches,
        remat=found.remat or cfg.remat,
    )


def candidates(
    cfg: TrainConfig, devices: int, rejected: collections.Counter
) -> Iterator[tuple[str | AxisRules, str]]:
    """The (layout, mesh) pairs worth an estimate, of the named layouts and `cfg`'s own.

    Impossible ones are counted in `rejected` by their reason.
    """
    seen = set()
    own = []
    layouts: list[tuple[str | AxisRules, AxisRules]] = [*LAYOUTS.items()]
    if isinstance(cfg.layout, AxisRules) and cfg.layout not in LAYOUTS.values():
        own.append(cfg.layout)
        layouts.append((cfg.layout, cfg.layout))
    for layout, rules in layouts:
        used = [
            axis
            for axis in MESH_AXES
            if axis != "slice" and any(axis in axes for _, axes in rules.table)
        ]
        for sizes in factorings(devices, len(used)):
            mesh = {axis: size for axis, size in zip(used, sizes, strict=True)}
            key = (
                layout in own,
                rules.exchange,
                tuple(sorted((a, s) for a, s in mesh.items() if s > 1)),
            )
            if key in seen:  # `full` with an axis of size 1 equals another layout
                continue
            if reason := impossible(cfg, mesh):
                rejected[reason] += 1
                continue
            try:
                check_batch(cfg, rules, {axis: mesh.get(axis, 1) for axis in MESH_AXES})
            except ValueError:
                rejected["batch or length does not divide over the mesh"] += 1
                continue
            seen.add(key)
            yield layout, ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1)


def factorings(number: int, places: int) -> Iterator[tuple[int, ...]]:
    """Every ordered product of `places` positive factors that is `number`.

    Example: 4 in two places gives (1, 4), (2, 2) and (4, 1).
    """
    if places == 1:
        yield (number,)
        return
    for first in (d for d in range(1, number + 1) if number % d == 0):
        for rest in factorings(number // first, places - 1):
            yield (first, *rest)


def impossible(cfg: TrainConfig, mesh: dict[str, int]) -> str:
    """Why the mesh cannot cut the model, or ""."""
    model = cfg.model
    if mesh.get("tensor", 1) > model.o_groups:
        return "tensor beyond the output groups"
    if model.n_routed_experts % mesh.get("expert", 1):
        return "expert does not divide the experts"
    if mesh.get("context", 1) > 1 and cfg.seq_len // mesh["context"] < model.sliding_window:
        return "context cuts rows shorter than a window"
    return ""


def _reason(error: str) -> str:
    if "would cut a block" in error:
        return "would cut blocks of packed weights"
    return "a weight does not divide over the mesh" if "does not divide by" in error else error


def front(found: list[Estimate]) -> tuple[Estimate, ...]:
    """The estimates that no other beats in both time and memory; `found` is sorted by time."""
    kept: list[Estimate] = []
    for one in found:
        if not kept or one.memory_bytes < kept[-1].memory_bytes:
            kept.append(one)
    return tuple(kept)


def _nothing(
    cfg: TrainConfig,
    devices: int,
    hardware: Hardware,
    closest: tuple[float, TrainConfig] | None,
    rejected,
) -> str:
    if closest is None:
        nearest = max(devices, round(cfg.batch_size / devices) * devices)
        return (
            f"batch: no mesh of {devices} devices divides {cfg.batch_size} rows of {cfg.seq_len} "
            f"({'; '.join(rejected)}); nearest that does: --batch {nearest}"
        )
    need, one = closest
    has = hardware.of_a_device(devices).hbm_bytes
    enough = 2 ** math.ceil(math.log2(devices * need / (USABLE * has)))
    return (
        f"nothing fits on {devices} devices of {hardware.name}: {one.layout} on {one.mesh} comes "
        f"closest and needs {gigabytes(need)} of {gigabytes(has)} each; "
        f"try --chips {max(enough, 2 * devices) // hardware.devices_per_chip}"
    )
