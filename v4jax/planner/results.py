"""What `v4jax layout` found, as tables and as JSON.

Next file to read: v4jax/planner/nearest.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from v4jax.planner.compiled import LayoutReport
from v4jax.planner.estimate import Estimate, gigabytes
from v4jax.planner.search import Found


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
        return rows + self.estimate.rows() + self._timing()

    def _timing(self) -> list[tuple]:
        """XLA's estimate beside the fast model's, where it was asked for."""
        if self.compiled is None or self.compiled.timing is None:
            return []
        model = {part: row[2] for part, row in self.estimate.parts.items()}
        return self.compiled.timing.rows(model)

    def lines(self) -> list[str]:
        return [f"warning: {line}" for line in self.notes]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two estimates side by side."""

    first: Estimate
    second: Estimate

    def to_dict(self) -> dict[str, Any]:
        both = {"first": self.first.to_dict(), "second": self.second.to_dict()}
        return both | {"warnings": self.lines()}

    def rows(self) -> list[tuple[str, str, str, str]]:
        a, b = self.first, self.second
        rows = [("", f"{a.layout}: {a.mesh}", f"{b.layout}: {b.mesh}", "second / first")]

        def row(name: str, x: float, y: float, show: Callable[[float], str]) -> None:
            rows.append((name, show(x), show(y), f"{y / x:.2f}" if x else ""))

        row("step", a.step_seconds, b.step_seconds, lambda s: f"{s:.3f} s")
        row("exchanges", a.exchange_seconds, b.exchange_seconds, lambda s: f"{s:.3f} s")
        row("memory", a.memory_bytes, b.memory_bytes, gigabytes)
        for kind in a.memory:
            row(f"memory: {kind}", a.memory[kind], b.memory[kind], gigabytes)
        for part in dict.fromkeys((*a.parts, *b.parts)):
            x, y = (e.parts.get(part, (0, 0, 0))[2] for e in (a, b))
            row(f"time: {part}", x, y, lambda s: f"{s * 1e3:.1f} ms")
        for axis in dict.fromkeys(axes for axes, _ in (*a.sent, *b.sent)):
            x, y = (sum(v[0] for k, v in e.sent.items() if k[0] == axis) for e in (a, b))
            row(f"sent: {'+'.join(axis)}", x, y, gigabytes)
        row("MFU", a.mfu, b.mfu, lambda s: f"{s:.1%}")
        rows.append(("bound by", a.bound, b.bound, ""))
        return rows

    def lines(self) -> list[str]:
        """Which of the two do not fit a device."""
        needs = [
            f"{one.layout}: {one.mesh} needs {gigabytes(one.memory_bytes)}"
            for one in (self.first, self.second)
            if not one.fits
        ]
        if not needs:
            return []
        head = "neither fits" if len(needs) == 2 else "one does not fit"
        has = gigabytes(self.first.hbm)
        return [f"warning: {head}: {', and '.join(needs)} of {has} on each device"]


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
            timing = report.timing
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
            if timing is not None:
                step = f"{timing.step_seconds:.3f} s a step"
                model = f"the fast model {estimated.step_seconds:.3f} s"
                rows.append(("", timing.source, step, model))
        return rows

    def lines(self) -> list[str]:
        return [self.found.why()]
