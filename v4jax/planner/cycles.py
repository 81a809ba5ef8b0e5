"""What XLA itself says of the time of each operation of a compiled program, read from its HLO text.

XLA:TPU writes `estimated_cycles` beside fusions, products and copies; XLA:GPU writes a list,
`reification_cost`, beside fusions if `xla_gpu_collect_cost_model_stats` asks for it. Both say
nothing of other operations: gathers, scatters, sorts, copies between memories, kernels. These are
listed with the bytes that they move, because they hide cost. Collectives are left to
sharding/audit.py.

An operation in a loop counts as often as the loop runs, and of the branches of a conditional the
dearest counts.

Next file to read: v4jax/planner/cycle_sources.py.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from sharding.audit import KINDS, size_of
from sharding.hlo_loops import computation_of, computations, trips
from v4jax.planner.cycle_sources import sources_of

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

_GPU_MODELS = ("indexing-cost-model", "", "sol")
"""XLA:GPU's cost models, the first that rates an operation counts; one has no name.

For a product the best case counts, "sol": its tiles are tuned on a GPU only, so that the others
would rate tiles that never run.
"""


class Op(NamedTuple):
    """An operation that a device runs.

    Attributes:
      name: what the program calls it.
      kind: opcode; of a custom call its target.
      source: the JAX operation that it stems from, after the scopes around it, or that it serves
        (v4jax/planner/cycle_sources.py); "" if unknown.
      calls: how often one run of the program runs it.
      seconds: XLA's estimate of one call; None where it gives none.
      bytes: what one call writes; of a custom call (a kernel) what it reads too.
      flops: of one call of a kernel that states them, else 0.
    """

    name: str
    kind: str
    source: str
    calls: int
    seconds: float | None
    bytes: int
    flops: int = 0

    @property
    def family(self) -> str:
        """The name without its number: what the program calls operations like it."""
        return re.sub(r"(\.clone|\.remat)*[.\d]*$", "", self.name)


class Reading(NamedTuple):
    """The operations of a program, and the loops whose length its text does not state.

    Attributes:
      loops: sources of these loops.
    """

    ops: tuple[Op, ...]
    loops: tuple[str, ...]

    @property
    def seconds(self) -> float:
        return _seconds(self.ops)


class _Program(NamedTuple):
    bodies: dict[str, list[str]]
    clock: float
    unknown_runs: int
    loops: list[str]


def read_times(text: str, clock: float, unknown_runs: int = 1) -> Reading:
    """The operations of `compiled.as_text()`.

    Args:
      clock: cycles per second, for a TPU.
      unknown_runs: how often a loop counts whose length the text does not state.
    """
    program = _Program(computations(text), clock, unknown_runs, [])
    return Reading(tuple(_ops(program, "ENTRY", 1, "")), tuple(dict.fromkeys(program.loops)))


def _ops(program: _Program, name: str, times: int, around: str) -> list[Op]:
    """The operations of one computation that runs `times` times, and of those that it calls.

    Those without a source have that of the loop around them.
    """
    found: list[Op] = []
    sources = sources_of(program.bodies[name], program.bodies)
    types: dict[str, str] = {}
    for line in program.bodies[name]:
        match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(", line)
        if match is None:
            continue
        label, type_, kind = match.groups()
        types[label] = type_
        source = sources[label] or around
        if kind == "while":
            runs = trips(line, program.bodies, program.bodies[name])
            if runs is None:
                program.loops.append(source)
                runs = program.unknown_runs
            if runs:
                found += _ops(program, computation_of("body", line), times * runs, source)
        elif kind == "conditional":
            branches = [_ops(program, branch, times, source) for branch in _branches(line)]
            found += max(branches, key=_seconds)
        elif kind in ("call", "async-start"):
            found += _ops(program, computation_of("(?:to_apply|calls)", line), times, source)
        elif _works(program, type_, kind, line):
            found.append(_op(program, match, times, types)._replace(source=source))
    return found


def _works(program: _Program, type_: str, kind: str, line: str) -> bool:
    """Whether an instruction takes time that is not an exchange's."""
    if kind in _FREE or kind.endswith(("-done", "-update")):
        return False
    if kind.removesuffix("-start") in KINDS:
        return False
    if kind == "custom-call":
        return _target(line) not in _SETTERS
    if _estimate(line, kind, program.clock) is not None:
        return True
    if re.match(r"\w+\[\]", type_):
        return False  # a TPU's scalar core, or a thread of a GPU, takes next to no time
    return kind != "fusion" or "AsyncCollective" not in "\n".join(
        program.bodies[computation_of("calls", line)]
    )


def _op(program: _Program, match: re.Match, times: int, types: dict[str, str]) -> Op:
    label, type_, kind = match.groups()
    line = match.string
    seconds, moved = _estimate(line, kind, program.clock), size_of(_written(type_, kind))
    if kind != "custom-call":
        return Op(label, kind, "", times, seconds, moved)
    operands = re.findall(r"%([\w.\-]+)", line.split(" custom-call(", 1)[1].split(")")[0])
    moved += sum(size_of(types.get(operand, "")) for operand in operands)
    stated = re.search(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"', line)
    flops, moved = map(int, stated.groups()) if stated else (0, moved)
    return Op(label, _target(line), "", times, seconds, moved, flops)


def _written(type_: str, kind: str) -> str:
    """The type of what an instruction writes; a copy that starts lists its source after it."""
    return type_[1:].split("}, ")[0] if kind == "copy-start" else type_


def _estimate(line: str, kind: str, clock: float) -> float | None:
    """XLA's seconds of one call.

    On a TPU they are those of the loop that it makes, else of the code that it simulated.
    """
    if '"reification_cost":[{' in line:
        return _gpu_estimate(line)
    found = re.search(r'"window_config":\{[^}]*"estimated_cycles":"(\d+)"', line) or re.search(
        r'"estimated_cycles":"(\d+)"', line
    )
    return int(found[1]) / clock if found else None


def _gpu_estimate(line: str) -> float:
    costs = re.search(r'"reification_cost":\[(.*?)\]', line)
    assert costs is not None, "the caller has seen it"
    each = re.findall(r'"exec_time_us":([\d.e+\-]+),.*?"name":"(.*?)"', costs[1])
    by_model = {name: float(microseconds) * 1e-6 for microseconds, name in each}
    models = _GPU_MODELS[::-1] if re.search(r'"kind":"__\w*gemm', line) else _GPU_MODELS
    return next(by_model[name] for name in models if name in by_model)


def _target(line: str) -> str:
    found = re.search(r'custom_call_target="([^"]+)"', line)
    return found[1] if found else "custom-call"


def _branches(line: str) -> list[str]:
    """The computations of a conditional's branches."""
    if listed := re.search(r"branch_computations=\{(.*?)\}", line):
        return re.findall(r"%?([\w.\-]+)", listed[1])
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)


def _seconds(ops: Iterable[Op]) -> float:
    return sum(op.calls * op.seconds for op in ops if op.seconds is not None)
