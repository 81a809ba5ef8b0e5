"""`v4jax layout`: an estimate, compiled report, comparison or search, as one printable result.

Next file to read: v4jax/planner/page.py.
"""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

from sharding.mesh import parse_mesh
from sharding.rules import MESH_AXES, check_has_mesh, layout_for
from v4jax.config import ModelConfig
from v4jax.planner.compiled import LayoutReport, report_layout
from v4jax.planner.estimate import Estimate, estimate, gigabytes, platform_of
from v4jax.planner.hardware import Target, target_of
from v4jax.planner.notes import notes
from v4jax.planner.search import Found, as_estimated, factorings, impossible, search
from v4jax.planner.weights import cut_of, weights_of
from v4jax.python_files import read_layout
from v4jax.train.config import TrainConfig
from v4jax.train.step import check_batch


class Request(NamedTuple):
    """What is asked of a layout.

    Attributes:
      target: chips, as target_of reads them.
      what: "train" or "decode".
      paper: compile nothing.
      lower_only: stop before compiling.
      effort: of the compiler for TPUs (planner/compiled.py).
      fp8: products run at the fp8 rate.
      released: decode from the released formats; estimated only, as no program here computes with
        them.
    """

    target: str = "cpu"
    what: str = "train"
    paper: bool = False
    lower_only: bool = False
    effort: str | None = None
    fp8: bool = False
    released: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """An estimate, what was compiled (None: nothing), and warnings."""

    estimate: Estimate
    compiled: LayoutReport | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        compiled = self.compiled.to_dict() if self.compiled else {}
        return compiled | {"estimate": self.estimate.to_dict(), "warnings": list(self.notes)}

    def rows(self) -> list[tuple]:
        rows = self.compiled.rows() if self.compiled else []
        return rows + self.estimate.rows()

    def lines(self) -> list[str]:
        return [f"warning: {line}" for line in self.notes]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two estimates side by side."""

    first: Estimate
    second: Estimate

    def to_dict(self) -> dict[str, Any]:
        return {"first": self.first.to_dict(), "second": self.second.to_dict()}

    def rows(self) -> list[tuple[str, str, str, str]]:
        a, b = self.first, self.second
        rows = [("", f"{a.layout}: {a.mesh}", f"{b.layout}: {b.mesh}", "second / first")]

        def row(name, x, y, show):
            rows.append((name, show(x), show(y), f"{y / x:.2f}" if x else ""))

        row("step", a.step_seconds, b.step_seconds, lambda s: f"{s:.3f} s")
        row("exchanges", a.exchange_seconds, b.exchange_seconds, lambda s: f"{s:.3f} s")
        row("memory", a.memory_bytes, b.memory_bytes, gigabytes)
        for kind in a.memory:
            row(f"memory: {kind}", a.memory[kind], b.memory[kind], gigabytes)
        for part in dict.fromkeys((*a.parts, *b.parts)):
            row(
                f"time: {part}",
                *(e.parts.get(part, (0, 0, 0))[2] for e in (a, b)),
                lambda s: f"{s * 1e3:.1f} ms",
            )
        for axis in dict.fromkeys(axes for axes, _ in (*a.sent, *b.sent)):
            row(
                f"sent: {'+'.join(axis)}",
                *(sum(v[0] for k, v in e.sent.items() if k[0] == axis) for e in (a, b)),
                gigabytes,
            )
        row("MFU", a.mfu, b.mfu, lambda s: f"{s:.1%}")
        rows.append(("bound by", a.bound, b.bound, ""))
        return rows

    def lines(self) -> list[str]:
        return []


def config_of(config: TrainConfig | str, options) -> TrainConfig:
    """`config`, or one for a config.json, with the command line's mesh, layout, seq and batch.

    Without a batch on the command line there is one row per device, whatever `config` says.
    """
    if isinstance(config, str):
        model = ModelConfig.from_json(config)
        config = TrainConfig(
            model=model,
            run_dir="",
            steps=1,
            batch_size=1,
            seq_len=4096,
            learning_rate=1e-4,
            warmup_steps=0,
        )
    changes = {"mesh": options.mesh, "layout": options.layout, "seq_len": options.seq}
    config = dataclasses.replace(
        config, **{name: value for name, value in changes.items() if value is not None}
    )
    meshes = [_layout_and_mesh(text)[1] for text in options.compare or ()] or [config.mesh]
    devices = math.lcm(*(math.prod(parse_mesh(mesh).values()) for mesh in meshes))
    if options.search:
        devices = devices_of(options.target, options.chips)
    return dataclasses.replace(config, batch_size=options.batch or devices)


def examine(cfg: TrainConfig, request: Request) -> Result:
    """The estimate of `cfg`, and a compiled report where JAX can compile for the target.

    Raises:
      ValueError: mesh, batch, target or layout do not fit together; names the nearest choice that
        does.
    """
    target = checked(cfg, request)
    found = estimate(cfg, target.hardware, request.what, request.fp8, request.released)
    compiled, compiles = (
        None,
        not request.paper and not request.released and (target.topology or target.hardware.shared),
    )
    if request.effort and (request.lower_only or not compiles):
        raise ValueError(
            f"--effort: got {request.effort!r}, but nothing is compiled; "
            "it is for a TPU topology such as v5p:4x4x8"
        )
    if compiles:
        if target.topology and not found.fits and not request.lower_only:
            raise ValueError(
                f"it does not fit: {gigabytes(found.memory_bytes)} of {gigabytes(found.hbm)} "
                f"on each device; {nearest_fit(cfg, request)}"
            )
        compiled = report_layout(
            cfg, request.target, request.lower_only, request.what, request.effort
        )
    lines = notes(
        cfg, found, platform_of(target.hardware), compiled.collectives if compiled else ()
    )
    if not found.fits:
        lines.insert(1, f"Nearest: {nearest_fit(cfg, request)}.")
    return Result(found, compiled, tuple(lines))


def compare(cfg: TrainConfig, request: Request, texts: list[str]) -> Comparison:
    """The estimates of two layouts, each given as LAYOUT:MESH or FILE.py:NAME:MESH."""
    pair = []
    for text in texts:
        layout, mesh = _layout_and_mesh(text)
        one = dataclasses.replace(cfg, layout=read_layout(layout), mesh=mesh)
        pair.append(
            estimate(
                one, checked(one, request).hardware, request.what, request.fp8, request.released
            )
        )
    return Comparison(*pair)


def _layout_and_mesh(text: str) -> tuple[str, str]:
    layout, colon, mesh = text.rpartition(":")
    if not colon or (mesh and "=" not in mesh):
        raise ValueError(
            f"--compare: got {text!r}; must be LAYOUT:MESH, as pod:fsdp=8,expert=16 "
            "or FILE.py:NAME:fsdp=8"
        )
    return layout, mesh


@dataclasses.dataclass(frozen=True)
class Searched:
    """A search, and compiled reports of its first few layouts."""

    found: Found
    confirmed: tuple[LayoutReport, ...]

    def to_dict(self) -> dict[str, Any]:
        return self.found.to_dict() | {"confirmed": [report.to_dict() for report in self.confirmed]}

    def rows(self) -> list[tuple]:
        rows = self.found.rows()
        for estimated, report in zip(self.found.ranked, self.confirmed, strict=False):
            size, sent = (
                report.state_bytes + (report.temporary_bytes or 0),
                sum(row[3] for row in report.collectives),
            )
            sent_bytes = sum(row[0] for row in estimated.sent.values())
            rows.append(
                (
                    "compiled",
                    f"{report.layout}: {report.mesh}",
                    f"{gigabytes(size)} held, estimated {gigabytes(estimated.memory_bytes)}",
                    f"{gigabytes(sent)} sent, estimated {gigabytes(sent_bytes)}",
                )
            )
        return rows

    def lines(self) -> list[str]:
        return [self.found.why()]


def look_for(cfg: TrainConfig, request: Request, chips: int | None, confirm: int = 0) -> Searched:
    """Searches the layouts on `chips` chips of the target (default: as many as it names).

    Args:
      confirm: how many of the best layouts to compile.

    Raises:
      ValueError: nothing fits, or a flag that this target or search cannot use.
    """
    target = target_of(request.target)
    if confirm and not (target.topology or target.hardware.shared):
        raise ValueError(
            f"--confirm: JAX cannot compile for {request.target!r} here; "
            "give a TPU topology such as v5p:4x4x8, or leave it out"
        )
    if request.effort and not confirm:
        raise ValueError(
            f"--effort: got {request.effort!r}, but nothing is compiled; it goes with --confirm K"
        )
    found = search(
        cfg,
        target.hardware,
        devices_of(request.target, chips),
        request.what,
        request.fp8,
        request.released,
    )
    best = found.ranked[:confirm]
    cuts = (as_estimated(cfg, one) for one in best)
    return Searched(
        found,
        tuple(
            report_layout(cut, request.target, what=request.what, effort=request.effort)
            for cut in cuts
        ),
    )


def devices_of(target: str, chips: int | None) -> int:
    """The number of JAX devices to search on: `chips` chips, or as many as the target names."""
    found = target_of(target)
    if chips is None and ":" not in target:
        raise ValueError(
            f"--search needs --chips N, or a target with a size such as v5p:4x4x8; got {target!r}"
        )
    if chips is not None and chips < 1:
        raise ValueError(f"--chips: got {chips}; must be 1 or more")
    return (
        found.devices
        if chips is None
        else chips * (1 if found.hardware.shared else found.hardware.devices_per_chip)
    )


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
        for weight in weights_of(cfg.model):
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
