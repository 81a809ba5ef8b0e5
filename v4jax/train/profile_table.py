"""How long each part of the model takes, read from a trace of some steps.

The trace has one event for each operation that ran. The compiled program says in which named scopes
an operation was written.

Next file to read: v4jax/train/goodput.py.
"""

import collections
import gzip
import json
import pathlib
import re
from collections.abc import Iterable, Mapping

PARTS = ("embed", "attention", "experts", "mtp", "loss", "optimizer")
"""Named scopes of the model and the step. `loss` has both heads, the MTP's too."""
OTHER = "other"
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (?:\(.*?\)|\S+) ([\w-]+)\(")
_SCOPES = re.compile(r'op_name="([^"]*)"')
_CONTROL = ("while", "conditional", "call")
"""Operations whose time is that of the operations in them, which the trace has too."""


def part_of(scopes: str) -> str:
    """The part to which an operation belongs.

    All of the MTP layer belongs to mtp, although it has attention and experts of its own.

    Example: "jit(train_step)/transpose(jvp(Transformer))/block_0/attention/attn/dot_general" is
    attention.
    """
    words = set(re.findall(r"[\w.-]+", scopes))
    for part in ("optimizer", "mtp", "loss", "attention", "experts", "embed"):
        if part in words:
            return part
    return OTHER


def parts_of(texts: Iterable[str]) -> dict[str, str | None]:
    """Operation -> its part, for all operations of compiled programs (HLO text).

    None for those whose time is that of others.
    """
    found: dict[str, str | None] = {}
    for text in texts:
        for line in text.splitlines():
            operation = _OPERATION.match(line)
            if operation is None:
                continue
            name, kind = operation.groups()
            scopes = _SCOPES.search(line)
            part = part_of(scopes[1]) if scopes else OTHER
            found[name] = None if kind in _CONTROL else part
    return found


def seconds_by_part(folder: pathlib.Path, parts: Mapping[str, str | None]) -> dict[str, float]:
    """Part -> seconds of its operations in a trace, added up over devices and threads.

    Operations of other programs are left out. {} if the trace names no operation of `parts`.

    Args:
      folder: the newest trace in it is read.
      parts: operation -> part (`parts_of`).
    """
    traces = sorted(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not traces:
        return {}
    with gzip.open(traces[-1]) as file:
        events = json.load(file)["traceEvents"]
    found: collections.Counter[str] = collections.Counter()
    for event in events:
        name = event.get("args", {}).get("hlo_op")
        part = parts.get(name) if event.get("ph") == "X" else None
        if part is not None:
            found[part] += event["dur"] / 1e6
    return {part: found[part] for part in (*PARTS, OTHER)} if found else {}


def table(seconds: Mapping[str, float], steps: int) -> list[str]:
    """Lines of a table: part, milliseconds a step, share."""
    if not seconds:
        return ["The trace names no operations of the step, so there is no time by part."]
    total = sum(seconds.values())
    lines = [f"{'part':<10} {'ms a step':>10} {'share':>6}"]
    for part, value in seconds.items():
        lines.append(f"{part:<10} {1e3 * value / steps:>10.2f} {value / total:>6.1%}")
    return [*lines, f"{'all':<10} {1e3 * total / steps:>10.2f} {1:>6.1%}"]
