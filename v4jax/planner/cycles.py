"""Where XLA thinks that the time of one compiled program goes: cycles that its HLO text states.

XLA:TPU writes `estimated_cycles` beside fusions, products and copies. It says nothing of others:
gathers, scatters, sorts, copies between memories, kernels. Those are listed apart, with the bytes
that they move, because they hide cost. Collectives are left to sharding/audit.py.

An instruction in a loop counts as often as the loop runs, and of the branches of a conditional the
dearest counts.

Next file to read: v4jax/planner/compiled.py.
"""

import re
from typing import NamedTuple

from sharding.audit import KINDS, size_of
from sharding.hlo_loops import computation_of, computations, trips

_FREE = (
    "parameter",
    "get-tuple-element",
    "tuple",
    "constant",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "optimization-barrier",
)
"""Instructions that make no code, or next to none."""

_SETTERS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding", "ConcatBitcast")
"""Custom calls that do no work: they name memory or state a fact."""


class Op(NamedTuple):
    """An instruction that a device runs.

    Attributes:
      name: what the program calls it, without its number.
      kind: opcode; of a custom call its target.
      source: the JAX operation that it stems from, after the scopes around it; "" if unknown.
      calls: how often one run of the program runs it.
      cycles: XLA's estimate of one call; None where it gives none.
      bytes: of what one call writes; of a kernel, of what it reads too.
    """

    name: str
    kind: str
    source: str
    calls: int
    cycles: int | None
    bytes: int


class Reading(NamedTuple):
    """The operations of a program, and the loops whose length its text does not state.

    Attributes:
      loops: sources of these loops, whose bodies count once.
    """

    ops: tuple[Op, ...]
    loops: tuple[str, ...]

    @property
    def cycles(self) -> int:
        return _cycles(self.ops)


def read_cycles(text: str) -> Reading:
    """The operations of `compiled.as_text()` of a program of XLA:TPU."""
    bodies = computations(text)
    loops: list[str] = []
    return Reading(tuple(_ops("ENTRY", 1, bodies, loops)), tuple(dict.fromkeys(loops)))


def _ops(name: str, times: int, bodies: dict[str, list[str]], loops: list[str]) -> list[Op]:
    """The operations of one computation that runs `times` times, and of those that it calls."""
    found: list[Op] = []
    types: dict[str, str] = {}
    for line in bodies[name]:
        match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(", line)
        if match is None:
            continue
        label, type_, kind = match.groups()
        types[label] = type_
        if kind == "while":
            runs = trips(line, bodies, bodies[name])
            if runs is None:
                loops.append(_source(line))
                runs = 1
            if runs:
                found += _ops(computation_of("body", line), times * runs, bodies, loops)
        elif kind == "conditional":
            branches = [_ops(branch, times, bodies, loops) for branch in _branches(line)]
            found += max(branches, key=_cycles)
        elif kind in ("call", "async-start"):
            found += _ops(computation_of("(?:to_apply|calls)", line), times, bodies, loops)
        elif _works(kind, line, bodies) and not _scalar(type_, line):
            found.append(_op(label, type_, kind, line, times, types))
    return found


def _works(kind: str, line: str, bodies: dict[str, list[str]]) -> bool:
    """Whether an instruction takes time that is not an exchange's."""
    if kind in _FREE or kind.endswith(("-done", "-update")):
        return False
    if kind == "custom-call":
        return _target(line) not in _SETTERS
    if kind == "fusion" and _estimate(line) is None:
        inside = "\n".join(bodies[computation_of("calls", line)])
        return "AsyncCollective" not in inside
    return kind.removesuffix("-start") not in KINDS


def _scalar(type_: str, line: str) -> bool:
    """Whether an instruction is one of the scalar core's, which takes next to no time."""
    return re.match(r"\w+\[\]", type_) is not None and _estimate(line) is None


def _op(label: str, type_: str, kind: str, line: str, times: int, types: dict[str, str]) -> Op:
    moved = size_of(_written(type_, kind))
    if kind == "custom-call":
        kind = _target(line)
        operands = re.findall(r"%([\w.\-]+)", line.split(" custom-call(", 1)[1].split(")")[0])
        moved += sum(size_of(types.get(operand, "")) for operand in operands)
    name = re.sub(r"(\.clone|\.remat)*[.\d]*$", "", label)
    return Op(name, kind, _source(line), times, _estimate(line), moved)


def _written(type_: str, kind: str) -> str:
    """The type of what an instruction writes; a copy that starts lists its source after it."""
    return type_[1:].split("}, ")[0] if kind == "copy-start" else type_


def _estimate(line: str) -> int | None:
    """XLA's cycles of one call: of the loop that it makes, else of the code that it simulated."""
    found = re.search(r'"window_config":\{[^}]*"estimated_cycles":"(\d+)"', line) or re.search(
        r'"estimated_cycles":"(\d+)"', line
    )
    return int(found[1]) if found else None


def _source(line: str) -> str:
    found = re.search(r'op_name="([^"]*)"', line)
    return found[1] if found else ""


def _target(line: str) -> str:
    found = re.search(r'custom_call_target="([^"]+)"', line)
    return found[1] if found else "custom-call"


def _branches(line: str) -> list[str]:
    """The computations of a conditional's branches."""
    if listed := re.search(r"branch_computations=\{(.*?)\}", line):
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)


def _cycles(ops) -> int:
    return sum(op.calls * op.cycles for op in ops if op.cycles is not None)
