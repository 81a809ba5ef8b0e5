"""The files of a source: which are read, and which are left out and why.

Next file to read: v4jax/data/file_faults.py.
"""

import fnmatch
import heapq
import os
import pathlib
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from v4jax import storage
from v4jax.data.compressed import plain_name, require_zstd
from v4jax.data.config import Source
from v4jax.data.file_faults import DOT, EMPTY, SUFFIXES, fault_in_content, fault_of
from v4jax.storage import Entry, Place, Remote, place

_STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_SHOWN = 3


class Found(NamedTuple):
    """The files in a source's place.

    Attributes:
      files: (name, path) of those that are read, sorted. A name is relative to the source, with '/'
        on every system.
      left_out: (name, why) of the others; those that matter most come first.
      excluded: how many files the glob excludes.
      entries: size and tag of each file of a bucket; {} on a disk.
    """

    files: Sequence[tuple[str, Place]]
    left_out: list[tuple[str, str]]
    excluded: int
    entries: Mapping[Place, Entry] = {}


def find_files(source: Source) -> Found:
    """Every file of a source, read or left out.

    Links are followed. Each real folder counts once, under a name without links if it has one.
    So does each real file, under a name with a suffix if it has one (as in the Hub's cache).
    Names with a leading dot, empty files and files that the format does not read are left out.

    Raises:
      ValueError: no such place or data set, one that cannot be listed, a file beside its own
        compressed copy, or .zst files without the package that reads them.
    """
    if source.format == "hf":
        named = storage.data_set(source.path)
        commit = named.key.partition("@")[2]
        return Found([(".", named)], [], 0, {named: Entry(0, f"{source.split} {commit}")})
    root = place(source.path, "source")
    if isinstance(root, Remote):
        return _find_in_bucket(source, root)
    if source.path == "stdlib" and source.format == "text":
        return Found(_stdlib_files(), [], 0)
    if source.format != "text" and root.is_file():
        if root.suffix.lower() == ".zst":
            require_zstd(root)
        return Found([(".", root)], [], 0)
    if not root.is_dir():
        raise ValueError(f"source: {root}{_unusable(source, root)}")
    files, left_out, excluded = [], [], 0
    glob = pathlib.PurePath(source.glob).parts
    for name, path, fault in _walk(root, glob):
        if not fault and not _matches(tuple(name.split("/")), glob):
            excluded += 1
            continue
        fault = fault or fault_of(path, source)
        if fault:
            left_out.append((name, fault))
        else:
            files.append((name, path))
    files, again = _each_once(files)
    left_out += again
    files.sort(key=lambda file: file[1])
    _refuse_twins(root, files)
    left_out.sort(key=lambda one: (one[1] == DOT, one[1] == EMPTY, one[0]))
    return Found(files, left_out, excluded)


def unread_files(source: Source, found: Found) -> str:
    """Says which files of a source's folder are not read; "" if all are."""
    parts = []
    if found.left_out:
        shown = ", ".join(f"{name} ({why})" for name, why in found.left_out[:_SHOWN])
        more = len(found.left_out) - _SHOWN
        more_words = f" and {more} more" if more > 0 else ""
        parts.append(f"{len(found.left_out)} left out: {shown}{more_words}")
    if found.excluded:
        parts.append(f"{found.excluded} excluded by glob={source.glob!r}")
    if not parts:
        return ""
    return "; ".join([f"{len(found.files)} file(s) are read", *parts])


def nothing_found(source: Source, found: Found) -> ValueError:
    """The error for a folder without a file to read; it says what is there instead."""
    unread = unread_files(source, found)
    said = f" ({unread})" if unread else ""
    root = place(source.path, "source")
    if source.format == "text":
        return ValueError(
            f"source: {root} has no text in files matching {source.glob!r}; "
            f"expected UTF-8 text files{said}"
        )
    *most, last = SUFFIXES[source.format]
    suffixes = f"{', '.join(most)} or {last}" if most else last
    matching = "" if source.glob == "**/*" else f" matching {source.glob!r}"
    return ValueError(f"source: {root} holds no {suffixes} file{matching}{said}")


def _find_in_bucket(source: Source, root: Remote) -> Found:
    """`find_files` of a bucket's folder, or of an object: one request for 1,000 names."""
    listed = storage.listing(root)
    if not listed and source.format != "text" and root.is_file():
        entry = storage.listing(root.parent)[root.name]
        return Found([(".", root)], [], 0, {root: entry})
    if not listed:
        raise ValueError(f"source: {root}: no such file or folder")
    files, left_out, excluded = [], [], 0
    glob = pathlib.PurePath(source.glob).parts
    for name, entry in listed.items():
        parts = tuple(name.split("/"))
        if any(part.startswith(".") for part in parts):
            left_out.append((name, DOT))
        elif not _matches(parts, glob):
            excluded += 1
        elif fault := fault_in_content(root / name, entry.size, source):
            left_out.append((name, fault))
        else:
            files.append((name, root / name))
    _refuse_twins(root, files)
    left_out.sort(key=lambda one: (one[1] == DOT, one[1] == EMPTY, one[0]))
    return Found(files, left_out, excluded, {path: listed[name] for name, path in files})


def _walk(root: pathlib.Path, glob: tuple[str, ...]) -> Iterator[tuple[str, pathlib.Path, str]]:
    """(name, path, fault) of all files; visits each real folder once.

    A fault says why a file is left out whatever it contains; "" for none. Folders that the glob
    reaches come first, and among them those with fewer links. So a folder with two names is read
    under one that the glob wants, and under its own if the glob wants both.
    """
    seen, around = set(), {_identity(folder) for folder in root.resolve().parents}
    queue = [(False, 0, "")]
    while queue:
        _, links, folder = heapq.heappop(queue)
        identity = _identity(root / folder)
        if identity in around:
            yield f"{folder}/", root / folder, "a link to a folder around the source"
        if identity in around or identity in seen:
            continue
        seen.add(identity)
        for entry in _entries(root / folder):
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                yield name + "/" * _is_folder(entry), root / name, DOT
            elif _is_folder(entry):
                outside = not _matches(tuple(name.split("/")), glob, below=True)
                heapq.heappush(queue, (outside, links + entry.is_symlink(), name))
            else:
                yield name, root / name, ""


def _entries(folder: pathlib.Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"source: {folder} cannot be listed: {error.strerror}") from None


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # for example, a link to itself
        return False


def _identity(path: pathlib.Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_dev, state.st_ino


def _matches(parts: tuple[str, ...], glob: tuple[str, ...], below: bool = False) -> bool:
    """Whether a name matches a glob, part by part; ** matches any number of parts.

    Args:
      below: ask instead whether any name inside the folder of this name can match.
    """
    if not parts:
        return bool(glob) if below else all(part == "**" for part in glob)
    if not glob:
        return False
    if glob[0] == "**":
        return _matches(parts, glob[1:], below) or _matches(parts[1:], glob, below)
    return fnmatch.fnmatchcase(parts[0], glob[0]) and _matches(parts[1:], glob[1:], below)


def _stdlib_files() -> list[tuple[str, pathlib.Path]]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, inner, names in os.walk(root):
        inner[:] = [
            name for name in inner if not name.startswith(".") and name not in _STDLIB_SKIPPED
        ]
        paths += [
            pathlib.Path(folder, name) for name in names if name.endswith(".py") and name[0] != "."
        ]
    return [(path.relative_to(root).as_posix(), path) for path in sorted(paths) if path.is_file()]


def _unusable(source: Source, root: pathlib.Path) -> str:
    """What is wrong with a place that is no folder, as the end of an error message."""
    if not root.exists():
        return ": no such file or folder"
    if source.format == "text":
        return " is no folder; expected a folder of UTF-8 text files, or 'stdlib'"
    return " is no file and no folder"


def _each_once(
    files: list[tuple[str, pathlib.Path]],
) -> tuple[list[tuple[str, pathlib.Path]], list[tuple[str, str]]]:
    """(each real file under one name, its other names and why they are left out)."""
    named: dict[tuple[int, int], list[tuple[str, pathlib.Path]]] = {}
    for file in files:
        named.setdefault(_identity(file[1]), []).append(file)
    once, again = [], []
    for names in named.values():
        first, *others = sorted(names, key=_preference) if len(names) > 1 else names
        once.append(first)
        again += [(name, f"the same file as {first[0]}") for name, _ in others]
    return once, again


def _preference(file: tuple[str, pathlib.Path]) -> tuple[bool, bool, str]:
    """What sorts first the name that a file of several is read under."""
    name, path = file
    return not path.suffix, path.is_symlink(), name


def _refuse_twins(root: Place, files: Sequence[tuple[str, Place]]) -> None:
    """Raises ValueError for a file that is there both plain and compressed."""
    by_plain: dict[str, str] = {}
    for name, _ in files:
        other = by_plain.setdefault(plain_name(name), name)
        if other != name:
            raise ValueError(
                f"source: {root} holds both {other} and {name}; remove one, or narrow glob"
            )
