"""Which JAX operation an instruction of a compiled program stems from, where XLA says none.

XLA names no source for copies and fusions that it makes itself. Such an instruction serves what
uses it: a copy into another layout, for example, the product that wants that layout.

Next file to read: v4jax/planner/bundles.py.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

REACH = 8
"""How many instructions without a source may lie between one and the next that has one."""

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) [a-z][\w\-]*\((.*)$")


class _Known(NamedTuple):
    """Of one computation: label -> what the text says; and what each reads and is read by."""

    source: dict[str, str]
    reads: dict[str, list[str]]
    users: dict[str, list[str]]


def sources_of(lines: list[str], bodies: Mapping[str, list[str]]) -> dict[str, str]:
    """Label -> source of each instruction of a computation; "" if nothing near it has one.

    It is the one that XLA names; else that of the result of its fusion; else of the nearest
    instruction that uses it; else of the nearest that it reads.

    Args:
      lines: of the computation.
      bodies: lines of each computation of the program, by name.
    """
    known = _known(lines, bodies)

    def near(label: str, next_to: Callable[[str], list[str]]) -> str:
        seen, ring = {label}, [label]
        for _ in range(REACH):
            ring = [name for old in ring for name in next_to(old) if name not in seen]
            seen.update(ring)
            if found := next((known.source[name] for name in ring if known.source.get(name)), ""):
                return found
        return ""

    def users(label: str) -> list[str]:
        return known.users.get(label, [])

    def reads(label: str) -> list[str]:
        return known.reads.get(label, [])

    return {
        label: source or near(label, users) or near(label, reads)
        for label, source in known.source.items()
    }


def _known(lines: list[str], bodies: Mapping[str, list[str]]) -> _Known:
    found = _Known({}, {}, {})
    for line in lines:
        if match := _INSTRUCTION.match(line):
            label, rest = match.groups()
            found.source[label] = named(line) or _of_result(line, bodies)
            found.reads[label] = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            for name in found.reads[label]:
                found.users.setdefault(name, []).append(label)
    return found


def named(line: str) -> str:
    """The source that XLA names, "" if it names none; the name of an argument is none."""
    match = re.search(r'op_name="([^"]*)"', line)
    return match[1] if match and "/" in match[1] else ""


def _of_result(line: str, bodies: Mapping[str, list[str]]) -> str:
    """The source of a fusion's result, or of the last of its instructions that has one."""
    called = re.search(r" fusion\(.*calls=%?([\w.\-]+)", line)
    inner = bodies.get(called[1], []) if called else []
    return next((source for line in reversed(inner) if (source := named(line))), "")
