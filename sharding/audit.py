"""What a compiled program sends between devices: the collectives of its HLO text, with their bytes.

`Collective.bytes` is what one device sends in one call, for n devices a group:

    all-gather, all-to-all, reduce-scatter    (n-1)/n of the whole
    all-reduce                                twice that
    collective-permute                        the whole
    ragged-all-to-all                         (n-1)/n of the rows of an even load

The body of a loop counts as often as it runs.

Next file to read: v4jax/planner/notes.py.
"""

import itertools
import math
import re
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from sharding.exchange import FURTHER_ROUND

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
}


_Array = tuple[str, tuple[int, ...]]
"""A dtype as XLA names it, and a shape."""


class Collective(NamedTuple):
    """One collective of the program.

    Attributes:
      kind: one of KINDS.
      axes: mesh axes it runs over, outermost first; ("?",) where its groups are no product of axes.
      shape: the shape of its (largest) result on one device.
      calls: how often one run of the program executes it.
      bytes: bytes that one device sends in one call.
      source: the JAX operation that it stems from.
    """

    kind: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    calls: int
    bytes: int
    source: str


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """The collectives of `compiled.as_text()` of a program compiled for all devices of `mesh`.

    Further rounds of the experts' exchange (sharding/exchange.py) count as not called, since an
    even load needs none.

    Raises:
      ValueError: a collective is in another loop, and the text does not say how often that runs.
    """
    bodies = _computations(text)
    found = []
    for name, calls in _calls(bodies).items():
        # XLA:TPU spreads a collective over the fusions that run beside it and writes it in each of
        # them. It counts where it starts.
        goes_on = not any(
            'custom_call_target="AsyncCollectiveStart"' in line for line in bodies[name]
        )
        for line in bodies[name]:
            match = re.match(
                r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z\-]+?)(?:-start)?\(%?([\w.\-]+)?", line
            )
            if match is None or match[2] not in KINDS or (goes_on and "chain_id=" in line):
                continue
            if calls is None:
                raise ValueError(f"a loop of unknown length holds {line.strip()[:100]}")
            groups = _groups(line, mesh.size)
            if groups.shape[1] > 1:
                moved = _moved(match[1], line)
                # Operand or result has headroom; the other has the rows of an even load.
                if match[2] == "ragged-all-to-all":
                    moved = [
                        min(moved[0], _arrays(_shape_of(match[3], bodies[name]))[0], key=_size)
                    ]
                found.append(_collective(match[2], moved, line, groups, mesh, calls))
    return found


def _shape_of(name: str, lines: list[str]) -> str:
    """The type of the result of the instruction called `name`."""
    (found,) = (
        match[1]
        for line in lines
        if (match := re.match(rf"\s*%?{re.escape(name)} = (.*?) [a-z\-]+\(", line))
    )
    return found


def totals(found: list[Collective]) -> dict[tuple[str, str], tuple[int, int]]:
    """(axes joined by "+", kind) -> (calls, bytes one device sends) per step, most bytes first."""
    table: dict[tuple[str, str], tuple[int, int]] = {}
    for one in found:
        key = ("+".join(one.axes), one.kind)
        calls, size = table.get(key, (0, 0))
        table[key] = (calls + one.calls, size + one.calls * one.bytes)
    return dict(sorted(table.items(), key=lambda item: -item[1][1]))


def _moved(type_: str, line: str) -> list[_Array]:
    """The results of a collective.

    A tuple lists the parts of one exchange. A collective that starts asynchronously, except an
    all-reduce, lists operands and then results, as (a, b) or ((a, c), (b, d)), and then items
    without data.
    """
    if "-start(" not in line or "all-reduce-start(" in line or not type_.startswith("("):
        return _arrays(type_)
    return _arrays(_parts(type_)[1])


def _parts(tuple_: str) -> list[str]:
    """The types in a tuple type; for example "((a, b), c)" gives ["(a, b)", "c"]."""
    parts, depth = [""], 0
    # Without comments and layouts.
    for letter in re.sub(r"/\*.*?\*/|\{[^}]*\}", "", tuple_)[1:-1]:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _arrays(type_: str) -> list[_Array]:
    """The arrays of a type such as "f32[768,1,128]{2,1,0}" or a tuple of such."""
    return [
        (dtype, tuple(int(d) for d in dims.split(",") if d))
        for dtype, dims in re.findall(r"([a-z]+\d*\w*)\[([\d,]*)\]", type_)
    ]


def _size(array: _Array) -> int:
    """Bytes of an array."""
    return math.prod(array[1]) * _BYTES[array[0]]


def _collective(
    kind: str, moved: list[_Array], line: str, groups: np.ndarray, mesh: Mesh, calls: int
) -> Collective:
    whole, n = sum(map(_size, moved)), groups.shape[1]
    sent = {
        "all-reduce": 2 * whole * (n - 1) // n,
        "reduce-scatter": whole * (n - 1),  # the result is one share
        "collective-permute": whole,
    }.get(kind, whole * (n - 1) // n)
    source = re.search(r'op_name="([^"]*)"', line)
    return Collective(
        kind,
        _axes(groups, mesh),
        max(moved, key=_size)[1],
        calls,
        sent,
        source[1] if source else "",
    )


def _axes(groups: np.ndarray, mesh: Mesh) -> tuple[str, ...]:
    """Mesh axes along which the members of a group differ."""
    places = np.stack(np.unravel_index(groups, tuple(mesh.shape.values())), axis=-1)
    return tuple(
        axis for i, axis in enumerate(mesh.shape) if (places[..., i] != places[:, :1, i]).any()
    ) or ("?",)


def _groups(line: str, devices: int) -> np.ndarray:
    """The devices of each group of one collective, [groups, members], numbered along the mesh.

    A permute gives pairs of source and target. XLA writes groups in four ways:

        {{0,1},{2,3}}                     a list
        {}                                one group of all devices
        [2,4]<=[4,2]T(1,0)                rows of a transposed iota
        mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(2)2}
                                          along axes of a mesh over such an iota
    """
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
    if pairs:
        return np.array(
            [[int(i) for i in pair.split(",")] for pair in re.findall(r"(\d+,\d+)", pairs[1])]
        )
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line)
    if iota:
        return _iota(iota[2]).reshape(_numbers(iota[1]))
    along = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{('[^}]*)\}", line
    )
    if along:
        return _along(along[1], _iota(along[2] or f"[{devices}]"), along[3])
    listed = re.search(r"replica_groups=\{((?:\{[\d,]+\},?)*)\}", line)
    if listed is None:
        raise ValueError(f"groups of devices in a form that is not known: {line.strip()[:400]}")
    rows = re.findall(r"\{([\d,]+)\}", listed[1])
    return np.array([_numbers(row) for row in rows]) if rows else np.arange(devices)[None]


def _along(mesh: str, places: np.ndarray, members: str) -> np.ndarray:
    """Groups along some axes of a mesh.

    'b':(2)2 is a part of axis b: the part of size 2 that follows a part of size 2.
    """
    names = re.findall(r"'(\w+)'=(\d+)", mesh)
    parts = [
        (name, int(before or 1), int(size or dict(names)[name]))
        for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", members)
    ]
    shape, place_of = [], {}
    for name, size in names:
        cuts = {1, int(size)} | {
            cut for part, before, here in parts if part == name for cut in (before, before * here)
        }
        for before, end in itertools.pairwise(sorted(cuts)):
            place_of[name, before] = len(shape)
            shape.append(end // before)
    inner = [place_of[name, before] for name, before, size in parts if size > 1]
    return np.moveaxis(places.reshape(shape), inner, range(-len(inner), 0)).reshape(
        -1, math.prod(size for _, _, size in parts)
    )


def _iota(text: str) -> np.ndarray:
    """The numbers 0, 1, ... as "[4,2]T(1,0)" orders them: shaped, then transposed."""
    dims, order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    places = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return places.transpose(_numbers(order)) if order else places


def _numbers(text: str) -> list[int]:
    return [int(i) for i in text.split(",")]


def _computations(text: str) -> dict[str, list[str]]:
    """Name -> lines of each computation of an HLO module; the entry is called "ENTRY"."""
    bodies, name = {}, None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith(" "):
            name = "ENTRY" if head[1] else head[2]
            bodies[name] = []
        elif name is not None:
            bodies[name].append(line)
    return bodies


def _calls(bodies: dict[str, list[str]]) -> dict[str, int | None]:
    """How often one run of the program runs each computation; None in a loop of unknown length."""
    calls: dict[str, int | None] = {}

    def visit(name: str, times: int | None):
        calls[name] = (
            None if times is None or calls.get(name, 0) is None else calls.get(name, 0) + times
        )
        for line in bodies[name]:
            for role, inner in re.findall(
                r"(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)",
                line,
            ):
                if inner in bodies and role != "condition":
                    trips = _trips(line, bodies) if role == "body" else 1
                    visit(inner, None if trips is None or times is None else times * trips)
            for branches in re.findall(r"branch_computations=\{(.*?)\}", line):
                for inner in re.findall(r"%?([\w.\-]+)", branches):
                    visit(inner, times)

    visit("ENTRY", 1)
    return calls


def _trips(line: str, bodies: dict[str, list[str]]) -> int | None:
    """How often the body of a while instruction runs; None if the text does not say."""
    if FURTHER_ROUND in line:
        return 0
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(known[1])
    # XLA:TPU does not annotate loops that it makes itself, as for a product overlapped with its
    # exchange. They count up from 0.
    condition = "\n".join(bodies[re.search(r"condition=%?([\w.\-]+)", line)[1]])
    limit = re.search(r"ROOT .* compare\(%([\w.\-]+), %([\w.\-]+)\), direction=LT", condition)
    found = limit and re.search(rf"%{re.escape(limit[2])} = \S+ constant\((\d+)\)", condition)
    if not found:
        return None
    counter = re.search(
        rf"%{re.escape(limit[1])} = .*get-tuple-element\(.*\), index=(\d+)", condition
    )
    return -(
        -int(found[1])
        // (
            _step(bodies[re.search(r"body=%?([\w.\-]+)", line)[1]], int(counter[1]))
            if counter
            else 1
        )
    )


def _step(body: list[str], place: int) -> int:
    """How much one run of a loop's body adds to the counter at `place` of its state.

    1 if the text does not say.
    """
    (result,) = (line for line in body if "ROOT " in line)
    name = re.findall(r"%([\w.\-]+)", result.split(" tuple(")[-1])[place]
    added = next(
        (
            re.findall(r"%([\w.\-]+)", line.split(" add(")[1])[:2]
            for line in body
            if f"%{name} = " in line and " add(" in line
        ),
        [],
    )
    values = (
        re.search(rf"%{re.escape(part)} = \S+ constant\((\d+)\)", line)
        for part in added
        for line in body
    )
    return next((int(value[1]) for value in values if value), 1)
