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
                    found = trips(line, bodies, bodies[name]) if role == "body" else 1
                    visit(inner, None if found is None or times is None else times * found)
            for branches in re.findall(r"branch_computations=\{(.*?)\}", line):
                for inner in re.findall(r"%?([\w.\-]+)", branches):
                    visit(inner, times)

    visit("ENTRY", 1)
    return calls


def trips(line: str, bodies: dict[str, list[str]], around: list[str]) -> int | None:
    """How often the body of a while instruction runs; None if the text does not say.

    XLA:TPU annotates few loops. Their length follows from the condition, which compares a counter
    with a limit: each is a constant, or begins as one in the tuple that the loop starts from.
    Example: `compare(counter, limit), direction=LT`, a counter that starts at 2 and grows by 3, and
    the limit 10 make 3 runs.

    Args:
      line: the instruction.
      around: lines of the computation that holds it.
    """
    if FURTHER_ROUND in line:
        return 0
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(known[1])
    compared = _comparison(bodies[computation_of("condition", line)], bodies)
    if compared is None:
        return None
    (counter, place), (limit, limit_place), direction = compared
    initial = _initial(line, around)
    start = _element(initial, place, around) if place is not None else counter
    end = _element(initial, limit_place, around) if limit_place is not None else limit
    if end is None or place is None:
        return None
    start = 0 if start is None else start
    distance = start - end if direction in ("GT", "GE") else end - start
    step = _step(bodies[computation_of("body", line)], place)
    return max(0, -(-(distance + (direction in ("LE", "GE"))) // step))


def computation_of(role: str, line: str) -> str:
    """The name of a while instruction's computation; role is "condition" or "body"."""
    found = re.search(rf"\b{role}=%?([\w.\-]+)", line)
    if found is None:
        raise ValueError(f"a loop without a {role}: {line.strip()[:400]}")
    return found[1]


_Operand = tuple[int | None, int | None]
"""A constant, or the place of an element of the loop's state."""


def _comparison(
    condition: list[str], bodies: dict[str, list[str]]
) -> tuple[_Operand, _Operand, str] | None:
    """(left, right, direction) of the comparison that a condition ends in, inside a fusion too."""
    lines = _defined(condition)
    result = next((line for line in condition if line.lstrip().startswith("ROOT ")), "")
    given: list[str] = []
    inner = lines
    if fused := re.search(r" fusion\((.*?)\), .*calls=%?([\w.\-]+)", result):
        given = _names(fused[1])
        inner = _defined(bodies[fused[2]])
        result = next(line for line in bodies[fused[2]] if line.lstrip().startswith("ROOT "))
    found = re.search(r" compare\((.*?)\), direction=(\w\w)", result)
    if found is None:
        return None

    def operand(name: str) -> _Operand:
        line = inner.get(name, "")
        if given and (parameter := re.search(r" parameter\((\d+)\)", line)):
            line = lines.get(given[int(parameter[1])], "")
        place = re.search(r" get-tuple-element\(.*\), index=(\d+)", line)
        return _constant(line, lines | inner), int(place[1]) if place else None

    left, right = _names(found[1])[:2]
    return operand(left), operand(right), found[2]


def _initial(line: str, around: list[str]) -> list[str]:
    """Names of the elements of the tuple that a loop starts from; [] if the text does not say."""
    start = re.search(r" while\(.*?%?([\w.\-]+)\), condition", line)
    made = _defined(around).get(start[1], "") if start else ""
    return _names(made.split(" tuple(", 1)[1].split(")")[0]) if " tuple(" in made else []


def _element(initial: list[str], place: int, around: list[str]) -> int | None:
    lines = _defined(around)
    return _constant(lines.get(initial[place], ""), lines) if place < len(initial) else None


def _constant(line: str, lines: dict[str, str]) -> int | None:
    """The integer that an instruction gives, through copies and casts of a constant."""
    if value := re.search(r" constant\((-?\d+)\)", line):
        return int(value[1])
    source = re.search(r" (?:copy|bitcast|convert)\(.*?%?([\w.\-]+)\)", line)
    return _constant(lines.get(source[1], ""), lines) if source else None


def _step(body: list[str], place: int) -> int:
    """How much one run of a loop's body changes the counter at `place` of its state.

    1 if the text does not say.
    """
    lines = _defined(body)
    (result,) = (line for line in body if "ROOT " in line)
    name = _names(result.split(" tuple(")[-1])[place]
    added = re.search(r" (?:add|subtract)\((.*?)\)", lines.get(name, ""))
    values = (_constant(lines.get(part, ""), lines) for part in _names(added[1])) if added else ()
    return next((abs(value) for value in values if value), 1)


def _defined(body: list[str]) -> dict[str, str]:
    """Name -> line of each instruction of a computation."""
    return {
        found[1]: line
        for line in body
        if (found := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line))
    }


def _names(operands: str) -> list[str]:
    """The names among the operands of an instruction, which may carry types and comments."""
    return re.findall(r"%([\w.\-]+)", operands)
