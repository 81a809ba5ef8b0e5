"""What a compiled program sends between devices: the collectives of its HLO text, with their bytes.

`Collective.bytes` is what one device sends in one call, for n devices a group:

    all-gather, all-to-all, reduce-scatter    (n-1)/n of the whole
    all-reduce                                twice that
    collective-permute                        the whole
    ragged-all-to-all                         (n-1)/n of the rows of an even load

The body of a loop counts as often as it runs.

Next file to read: sharding/hlo_loops.py.
"""

import math
import re
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from sharding.hlo_loops import calls_of, computations
from sharding.replica_groups import groups_of

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
    bodies = computations(text)
    found = []
    for name, calls in calls_of(bodies).items():
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
            groups = groups_of(line, mesh.size)
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


def size_of(type_: str) -> int:
    """Bytes of the arrays of a type; tokens and arrays of unknown types count nothing."""
    return sum(_size(array) for array in _arrays(type_) if array[0] in _BYTES)


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
