"""What the repository cites exists: files, sections of documents, links, the next file to read.

Files are read as text only: docstrings and comments of Python files, all of Markdown files.
"""

import ast
import functools
import io
import pathlib
import posixpath
import re
import tokenize
from collections.abc import Iterator, Mapping

import pytest

ROOT = pathlib.Path(__file__).parent.parent
TOP = (".ci", "benchmarks", "configs", "docs", "examples", "sharding", "tests", "v4jax")
"""Folders whose files are cited by their whole path."""

_URL = re.compile(r"\w+://[^\s)>]+")
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_PATH = re.compile(
    r"(?<![\w/.$}*<>-])((?:[\w-]+/)*[\w-]+(?:\.[\w-]+)*"
    r"\.(?:py|md|jsonl|json|html|toml|png|cff|ipynb))\b(?:#([\w-]*\w))?"
)
_NEXT = re.compile(r"Next file to read:\s+(\S+?)[.,]?(?:\s|$)")
_PLACEHOLDER = re.compile(r"(?:[A-Z]+|my)\.py|encoding/[\w.]+")
"""Matches placeholders for the reader's own files, such as CONFIG.py and my.py, and the files of a
release's encoder."""


def sources() -> list[str]:
    """Every Python and Markdown file, by its path from the root."""
    found = [path for path in ROOT.glob("*.md")]
    for folder in TOP:
        found += [path for kind in ("py", "md") for path in (ROOT / folder).rglob(f"*.{kind}")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


@functools.cache
def files() -> frozenset[str]:
    """Every file that may be cited."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in TOP:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    return frozenset(path.relative_to(ROOT).as_posix() for path in found)


@functools.cache
def anchors() -> dict[str, frozenset[str]]:
    """Markdown file -> the ids that may follow a # in a link to it."""
    return {name: anchors_of((ROOT / name).read_text()) for name in files() if name.endswith(".md")}


def anchors_of(text: str) -> frozenset[str]:
    """Ids that are written out, and those that GitHub gives to headings.

    Example: "## What is *new*, and why" has the id what-is-new-and-why; a second one ends in -1.
    """
    ids = re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text)
    slugs: set[str] = set()
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#{1,6} +(.+?)[ #]*$", text, flags=re.MULTILINE):
        words = re.sub(r"<[^>]*>", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading))
        slug = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
        same = re.compile(rf"{re.escape(slug)}(-\d+)?")
        again = sum(same.fullmatch(known) is not None for known in slugs)
        slugs.add(f"{slug}-{again}" if again else slug)
    return frozenset(ids) | slugs


def prose(name: str, text: str) -> str:
    """The prose of a file."""
    if not name.endswith(".py"):
        return text
    expressions = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr))
    constants = (node.value for node in expressions if isinstance(node, ast.Constant))
    strings = [value for value in constants if isinstance(value, str)]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join(strings + [token.string for token in tokens if token.type == tokenize.COMMENT])


def faults(
    name: str, text: str, files: frozenset[str], anchors: Mapping[str, frozenset[str]]
) -> Iterator[str]:
    """What the prose `text` of the file `name` cites although it does not exist.

    A path that begins with a folder of TOP starts from the root; any other Python or Markdown file
    may be cited by the end of its path.
    """
    text = _URL.sub("", text)
    if name.endswith(".md"):
        found = (_link_fault(name, link, files, anchors) for link in _LINK.findall(text))
        yield from (fault for fault in found if fault is not None)
        text = _LINK.sub("", text)
    for path, anchor in _PATH.findall(text):
        if _PLACEHOLDER.fullmatch(path):
            continue
        whole = path.partition("/")[0] in TOP
        if not whole and not path.endswith((".py", ".md")):
            continue
        ends = () if whole else f"/{path}"
        meant = [file for file in files if file == path or file.endswith(ends)]
        if not meant:
            yield f"{name}: cites {path}, which does not exist"
        elif anchor and path.endswith(".md") and not any(anchor in anchors[file] for file in meant):
            yield f"{name}: cites {path}#{anchor}, a section that does not exist"


def _link_fault(
    name: str, link: str, files: frozenset[str], anchors: Mapping[str, frozenset[str]]
) -> str | None:
    """Why a relative link of the Markdown file `name` leads nowhere; None if it leads somewhere."""
    path, _, anchor = link.partition("#")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
    if target not in files and not any(file.startswith(f"{target}/") for file in files):
        return f"{name}: links to {link}, which does not exist"
    if anchor and target.endswith(".md") and anchor not in anchors[target]:
        return f"{name}: links to {link}, a section that does not exist"
    return None


@functools.cache
def leads() -> dict[str, str]:
    """File -> the one that its docstring names as the next to read, maybe by its name alone."""
    found = {}
    for name in sources():
        if not name.endswith(".py"):
            continue
        docstring = ast.get_docstring(ast.parse((ROOT / name).read_text()))
        match = _NEXT.search(docstring or "")
        if match is not None:
            neighbour = f"{name.rpartition('/')[0]}/{match[1]}"
            found[name] = neighbour if neighbour in files() else match[1]
    return found


def chain(name: str, leads: Mapping[str, str]) -> list[str]:
    """The files that `name` leads to, in order. One that is met again ends the list."""
    path = [name]
    while path[-1] in leads and path.count(path[-1]) == 1:
        path.append(leads[path[-1]])
    return path


@pytest.mark.parametrize("name", sources())
def test_what_is_cited_exists(name):
    assert list(faults(name, prose(name, (ROOT / name).read_text()), files(), anchors())) == []


def test_a_broken_citation_is_found():
    known = frozenset({"docs/x.md", "docs/y.md", "v4jax/model/a.py"})
    headings = '<a id="b"></a>\n## Of `c`, d\n## Of c, d\n'
    sections = {"docs/x.md": anchors_of("# X\n"), "docs/y.md": anchors_of(headings)}
    good = """docs/y.md#b, v4jax/model/a.py, model/a.py, a.py, CONFIG.py, my.py, a.jsonl;
        http://e.org/z.md, [](y.md#of-c-d), [y](y.md#of-c-d-1), [x](#x), [a](../v4jax/model/a.py)"""
    assert list(faults("docs/x.md", good, known, sections)) == []
    paths = ["docs/z.md", "docs/y.md#e", "v4jax/a.py", "b.py", "pit.md", "v4jax/t.json"]
    links = ["[y](z.md)", "[y](y.md#e)", "[x](#e)", "[a](a.py)"]
    for text in paths + links:
        assert len(list(faults("docs/x.md", text, known, sections))) == 1, text
    code = 'a = "docs/z.md"  # docs/u.md\n'
    assert prose("v4jax/model/a.py", f'"""docs/v.md"""\n{code}') == "docs/v.md\n# docs/u.md"


def test_next_files_lead_to_an_end():
    """From any file on, no file is met twice."""
    for name, target in leads().items():
        assert target in files(), f"{name} leads to {target}"
        path = chain(name, leads())
        assert len(set(path)) == len(path), " -> ".join(path)


def test_a_circle_is_found():
    assert chain("a", {"a": "b", "b": "c", "c": "b"}) == ["a", "b", "c", "b"]
    assert chain("a", {"a": "b", "b": "c"}) == ["a", "b", "c"]


def test_next_files_follow_the_reading_order_of_the_readme():
    """The README names the landmarks; the docstrings lead past all of them, in that order."""
    section = (ROOT / "README.md").read_text().partition("## Reading order")[2].partition(". ")[0]
    steps = [_LINK.sub("", step).strip(" [`\n") for step in section.split("->")]
    marks = [pathlib.PurePath(step).stem for step in steps]
    assert marks[0] == "README" and len(marks) > 5, marks
    path = chain("configs/demo.py", leads())
    rest = iter([pathlib.PurePath(name).stem for name in path])
    assert all(mark in rest for mark in marks[1:]), f"{marks[1:]} in {' -> '.join(path)}"
