"""How often a compiled program runs each computation of its HLO text.

Next file to read: sharding/replica_groups.py.
"""

import re

from sharding.exchange import FURTHER_ROUND


def computations(text: str) -> dict[str, list[str]]:
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


def calls_of(bodies: dict[str, list[str]]) -> dict[str, int | None]:
    """How often one run of the program runs each computation; None in a loop of unknown length."""
    calls: dict[str, int | None] = {}

    def visit(name: str, times: int | None):
        before = calls.get(name, 0)
        calls[name] = None if times is None or before is None else before + times
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
    condition = "\n".join(bodies[_computation("condition", line)])
    limit = re.search(r"ROOT .* compare\(%([\w.\-]+), %([\w.\-]+)\), direction=LT", condition)
    if limit is None:
        return None
    found = re.search(rf"%{re.escape(limit[2])} = \S+ constant\((\d+)\)", condition)
    if found is None:
        return None
    counter = re.search(
        rf"%{re.escape(limit[1])} = .*get-tuple-element\(.*\), index=(\d+)", condition
    )
    step = _step(bodies[_computation("body", line)], int(counter[1])) if counter else 1
    return -(-int(found[1]) // step)


def _computation(role: str, line: str) -> str:
    """The name of a while instruction's computation; role is "condition" or "body"."""
    found = re.search(rf"{role}=%?([\w.\-]+)", line)
    if found is None:
        raise ValueError(f"a loop without a {role}: {line.strip()[:400]}")
    return found[1]


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
