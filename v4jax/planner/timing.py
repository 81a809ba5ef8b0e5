"""A compiled step's time by part of the model, from XLA's own estimate (v4jax/planner/cycles.py).

Next file to read: v4jax/planner/compiled.py.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping

from sharding.rules import MESH_AXES
from v4jax.planner.cycles import Op, read_times
from v4jax.planner.hardware import Hardware, target_of
from v4jax.planner.roofline import exchange_time

ESTIMATES = ("model", "compiler")
"""Whose estimate of a step's time: the fast model's (v4jax/planner/estimate.py), or XLA's too."""

_PARTS = (
    ("optimizer", r"/optimizer/"),
    ("embedding", r"[/(]embed[/)]"),
    ("indexers", r"/(indexer|choice)/"),
    ("compressors", r"/compressor/"),
    ("attention scores", r"/scores/"),
    ("mHC", r"/(hc_attn|hc_ffn|hc_head)/"),
    ("norms", r"/\w*norm/"),
    ("shared experts", r"/shared_experts/"),
    ("routed experts", r"/ffn/experts/"),
    ("gates", r"/ffn/"),
    ("attention", r"/attn/|/mtp/mtp/"),
    ("mHC", r"/block_\d+/(attention|experts)/|/block/(attention|experts)/"),
    ("head", r"[/(](loss|head)[/)]"),
)
"""Part, by the names of v4jax/cost.py, and the scopes of its operations; the first match counts.

Between its modules a block expands the streams, which is mHC's.
"""

OTHER = "other"
"""Operations that serve no scope: casts of stacked weights, what a loop of layers begins with."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """What XLA expects of one step. Seconds and bytes are those of one device.

    Attributes:
      source: whose estimate it is.
      parts: part of the model -> seconds of its forward and of its backward pass, which recomputes;
        the longest first. The optimizer counts as forward.
      unknown: (part, kind of operation, calls, bytes, least seconds) of operations without an
        estimate, which are not among `parts`; the longest first. The least seconds are those of the
        bytes, and of the FLOPs that a kernel states, at the peaks. Kinds that end in "-start" run
        beside others.
      exchanges: (mesh axes, kind, calls, bytes sent, seconds at the rates of the links).
      loops: sources of loops of unknown length, which count once.
      step_seconds: of the parts, of operations without an estimate at least (but for those that
        run beside others), and of exchanges what is not hidden (Hardware.overlap).
    """

    source: str
    parts: dict[str, tuple[float, float]]
    unknown: tuple[tuple[str, str, int, int, float], ...]
    exchanges: tuple[tuple[str, str, int, int, float], ...]
    loops: tuple[str, ...]
    step_seconds: float

    @property
    def computing_seconds(self) -> float:
        return sum(map(sum, self.parts.values()))

    @property
    def unknown_seconds(self) -> float:
        """Of operations that do not run beside others."""
        return sum(row[4] for row in self.unknown if not row[1].endswith("-start"))

    def rows(self, model: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
        """A table for people, beside the seconds that the fast model gives to each part."""
        rows = [(self.source, "forward, backward", "together", "the fast model")]
        for part in dict.fromkeys((*self.parts, *model)):
            forward, backward = self.parts.get(part, (0.0, 0.0))
            each = f"{_ms(forward)}, {_ms(backward)}" if backward else _ms(forward)
            rows.append((part, each, _ms(forward + backward), _ms(model.get(part, 0.0))))
        both = (_ms(self.computing_seconds), _ms(sum(model.values())))
        rows.append(("all parts", "", *both))
        rows += self._unknown_rows()
        for axes, kind, calls, size, seconds in self.exchanges:
            words = (f"{calls} calls, {size / 1e9:.2f} GB", _ms(seconds))
            rows.append((f"exchange: {axes}", kind, *words))
        rows += [("loop of unknown length", loop, "counts once", "") for loop in self.loops]
        rows.append(("step", "at least", f"{self.step_seconds:.3f} s", ""))
        return rows

    def _unknown_rows(self, share: float = 0.01) -> list[tuple[str, str, str, str]]:
        """The operations without an estimate; those below this share of their time as one row."""
        least = share * sum(row[4] for row in self.unknown)
        rows = []
        for part, kind, calls, size, seconds in (row for row in self.unknown if row[4] >= least):
            words = (f"{calls} calls, {size / 1e9:.2f} GB", f"{_ms(seconds)} at least")
            rows.append((f"no estimate: {part}", kind, *words))
        few = [row for row in self.unknown if row[4] < least]
        calls, seconds = sum(row[2] for row in few), sum(row[4] for row in few)
        return [*rows, ("no estimate: others", "", f"{calls} calls", f"{_ms(seconds)} at least")]


def check_estimate(estimate: str, target: str, lower_only: bool, effort: str | None) -> None:
    """Refuses an estimate that the compiler cannot give.

    Raises:
      ValueError: an unknown estimate, or XLA's of a program that is not compiled, not with full
        effort, or for a target whose compiler gives none.
    """
    if estimate not in ESTIMATES:
        raise ValueError(f"estimate: got {estimate!r}; must be one of {', '.join(ESTIMATES)}")
    if estimate == "model":
        return
    found = target_of(target)
    if not found.topology:
        raise ValueError(
            f"--estimate compiler: XLA gives none for {target!r}; it does for a TPU topology such "
            "as v5p:4x4x8 (extra `tpu`), for h100:N and h200:N (extra `gpu`)"
        )
    if lower_only:
        raise ValueError("--estimate compiler: nothing is compiled; leave out --lower-only")
    if effort == "quick":
        raise ValueError(
            "--estimate compiler: got --effort 'quick', which picks other tiles; leave it out"
        )


def timing_of(
    text: str,
    sent: Mapping[tuple[str, str], tuple[int, int]],
    hardware: Hardware,
    sizes: Mapping[str, int],
) -> Timing:
    """The timing of a program.

    Args:
      text: of the compiled program.
      sent: (axes joined by "+", kind) -> (calls, bytes) of its collectives.
      hardware: of one JAX device.
      sizes: mesh axis -> size.
    """
    reading = read_times(text, hardware.clock)
    parts: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for op in reading.ops:
        if op.seconds is not None:
            part, backward = part_of(op.source)
            parts[part][backward] += op.calls * op.seconds
    most_first = sorted(parts.items(), key=lambda item: -sum(item[1]))
    exchanges = tuple(
        (axes, kind, calls, size, _exchange(axes, kind, calls, size, hardware, sizes))
        for (axes, kind), (calls, size) in sent.items()
    )
    found = Timing(
        source="XLA's estimate",
        parts={part: (forward, backward) for part, (forward, backward) in most_first},
        unknown=_unknown(reading.ops, hardware),
        exchanges=exchanges,
        loops=reading.loops,
        step_seconds=0.0,
    )
    exchanging = sum(row[4] for row in exchanges)
    computing = found.computing_seconds + found.unknown_seconds
    exposed = max(exchanging * (1 - hardware.overlap), exchanging - computing)
    return dataclasses.replace(found, step_seconds=computing + exposed)


def _unknown(ops: Iterable[Op], hardware: Hardware) -> tuple[tuple[str, str, int, int, float], ...]:
    """Operations without an estimate by part and kind (Timing.unknown)."""
    table: dict[tuple[str, str], tuple[int, int, float]] = {}
    for op in ops:
        if op.seconds is None:
            key = (part_of(op.source)[0], op.family if op.kind == "fusion" else op.kind)
            calls, size, seconds = table.get(key, (0, 0, 0.0))
            least = max(op.bytes / hardware.hbm_bandwidth, op.flops / hardware.bf16_flops)
            table[key] = (calls + op.calls, size + op.calls * op.bytes, seconds + op.calls * least)
    rows = [(*key, *row) for key, row in table.items()]
    return tuple(sorted(rows, key=lambda row: -row[4]))


def part_of(source: str) -> tuple[str, bool]:
    """(the part of the model that an operation belongs to, whether it is of the backward pass).

    Example: "jit(step)/transpose(jvp(Transformer))/block_0/attention/attn/mul" is of attention's
    backward pass.
    """
    part = next((part for part, scopes in _PARTS if re.search(scopes, source)), OTHER)
    return part, "transpose(" in source and part != "optimizer"


def _exchange(
    axes: str, kind: str, calls: int, size: int, device: Hardware, sizes: Mapping[str, int]
) -> float:
    """Seconds of a kind of exchange; along all axes where its groups are no product of axes."""
    named = tuple(axes.split("+"))
    if "?" in named:
        named = tuple(axis for axis in MESH_AXES if sizes[axis] > 1)
    return exchange_time(size, calls, named, kind, device, sizes)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"
