"""Axis suffixes tell the truth: the legend at the head of a file declares their letters.

An array ends in its axes, as in x_BSD or sink_N; a lower-case letter is one device's share of the
axis. The docstring of the file declares each letter in a line that starts with "Shapes:" or
"Axes:", as in "Shapes: B batch, S positions (of a chunk), A and Z widths". The legend ends at an
empty line or at the next file to read.
"""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MEANINGS = {
    "B": "batch",
    "S": "positions",
    "D": "hidden",
    "N": "heads",
    "H": "head dim",
    "V": "vocabulary",
    "E": "experts",
    "F": "expert hidden",
    "C": "entries",
    "X": "streams",
    "L": "layers",
}
"""Letters that mean the same in every file, and how their declarations begin."""
OTHERWISE: dict[tuple[str, str], str] = {}
"""(file, letter) -> why the letter means something else there."""

_NAME = re.compile(r"(?<![\w%])_*[a-z]\w*_([A-Za-z0-9]*[A-Z][A-Za-z0-9]*)\b")
_LEGEND = re.compile(
    r"^(?:Shapes|Axes): +(.*?)(?=^\s*$|^Next file|^(?:Shapes|Axes):|\Z)", re.M | re.S
)
_DECLARED = re.compile(r"((?:[A-Za-z], )*[A-Za-z](?: and [A-Za-z])*) (\w.*)", re.S)
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for room in ("sharding", "v4jax")
    for path in (ROOT / room).rglob("*.py")
)


def suffixes(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, name, suffix) of every name that ends in axes, in code and in prose."""
    for number, line in enumerate(text.splitlines(), 1):
        for match in _NAME.finditer(line):
            yield number, match[0], match[1]


def declarations(text: str) -> Iterator[tuple[str, str]]:
    """(letter, meaning) of each declaration of the legend.

    Example: "Shapes: A and Z widths, B batch (padded, if cut); lower case = this device's share"
    declares A and Z as "widths" and B as "batch (padded, if cut)".
    """
    docstring = ast.get_docstring(ast.parse(text)) or ""
    for legend in _LEGEND.findall(docstring):
        for part in re.split(r"[,;.](?=\s|$)(?![^(]*\))", " ".join(legend.split())):
            match = _DECLARED.fullmatch(part.strip())
            for letter in re.findall(r"\b[A-Za-z]\b", match[1]) if match else ():
                yield letter, match[2]


def faults(file: str, text: str) -> Iterator[str]:
    """What the legend of a file leaves out, says twice, or says otherwise than other files."""
    declared: dict[str, str] = {}
    for letter, meaning in declarations(text):
        if letter in declared:
            yield f"{file}: the legend declares {letter} twice"
        declared[letter] = meaning
        agreed = MEANINGS.get(letter)
        words = meaning.partition("(")[0]
        if agreed and f" {agreed} " not in f" {words} " and (file, letter) not in OTHERWISE:
            yield f"{file}: {letter} is {meaning!r}; in every file it is {agreed!r}"
    shares = "lower case = this device's share" in " ".join(text.split())
    for line, name, suffix in suffixes(text):
        for letter in dict.fromkeys(re.findall("[A-Za-z]", suffix)):
            if letter.islower() and not shares:
                yield f"{file}:{line}: {name}: the legend does not say what lower case means"
            elif letter.upper() not in declared:
                yield f"{file}:{line}: {name}: the legend does not declare {letter.upper()}"


@pytest.mark.parametrize("file", FILES)
def test_the_legend_declares_every_axis(file):
    assert list(faults(file, (ROOT / file).read_text())) == []


def test_every_exception_is_needed():
    for file, letter in OTHERWISE:
        declared = dict(declarations((ROOT / file).read_text()))
        assert letter in declared and not declared[letter].startswith(MEANINGS[letter])


def test_a_missing_letter_is_found():
    head = '"""Sums.\n\nShapes: A and Z widths, B batch (all, if cut),\nS positions{}\n"""\n'
    text = head.format(". ") + "def f(x_BS, w_AZ, y_B2Z, LIMIT_Q): return x_BS.at_first"
    assert list(faults("f.py", text)) == []
    assert list(faults("f.py", text.replace("x_BS", "x_BSD"))) == [
        "f.py:6: x_BSD: the legend does not declare D",
        "f.py:6: x_BSD: the legend does not declare D",
    ]
    assert len(list(faults("f.py", text + ".sink_N"))) == 1
    assert len(list(faults("f.py", text + ".x_bS"))) == 1
    shared = text.replace("positions", "positions; lower case = this device's share")
    assert list(faults("f.py", shared + ".x_bS")) == []
    for legend, words in (("; S tokens", "twice"), ("; D widths", "it is 'hidden'")):
        found = list(faults("f.py", head.format(legend)))
        assert any(words in fault for fault in found), found
