"""Files of text as documents: found, checked, and split into those to train on and those held out.

Next file to read: v4jax/data/records.py.
"""

import codecs
import hashlib
import pathlib
import sysconfig
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from v4jax.data.config import DataConfig, Source

_STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Document(NamedTuple):
    """One UTF-8 file: its path relative to the source, with '/' on every system; the file itself; its bytes."""

    name: str
    path: pathlib.Path
    size: int


def read_documents(source: Source) -> list[Document]:
    """All documents of a source of text files, sorted by name; each is read once here, to check that it is UTF-8.

    Of the standard library, files that are not UTF-8 are left out; in a folder they are an error.

    Raises:
      ValueError: no such folder, no document in it, or a file of it that is not UTF-8 text; names it.
    """
    ours = source.path == "stdlib"
    root, glob = (pathlib.Path(sysconfig.get_paths()["stdlib"]), "**/*.py") if ours else (pathlib.Path(source.path).expanduser(), source.glob)
    if not root.is_dir():
        raise ValueError(f"source: {root} is no folder; expected a folder of UTF-8 text files, or 'stdlib'")
    documents = []
    for path in found_files(root, glob):
        parts = path.relative_to(root).parts
        if ours and _STDLIB_SKIPPED.intersection(parts):
            continue
        fault, size = _utf8_fault(path)
        if fault and not ours:
            raise ValueError(f"source: {path} is not UTF-8 text ({fault}); remove it or narrow glob={source.glob!r}")
        if size and not fault:
            documents.append(Document("/".join(parts), path, size))
    if not documents:
        raise ValueError(f"source: {root} has no text in files matching {glob!r}; expected UTF-8 text files")
    return sorted(documents)


def found_files(root: pathlib.Path, glob: str) -> list[pathlib.Path]:
    """Files below root that match; no part of their path below root starts with a dot. In any order."""
    return [
        path for path in root.glob(glob)
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]  # fmt: skip


def split_documents(cfg: DataConfig, documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(train, held out), by the hash of each document's name: a file stays on its side whatever is added beside it.

    Raises:
      ValueError: fewer than two documents.
    """
    held_D = held_out_of([unit_hash(document.name) for document in documents], cfg.held_out)
    sides = [[document for document, held in zip(documents, held_D, strict=True) if held == side] for side in (False, True)]
    return sides[0], sides[1]


def held_out_of(hashes: Sequence[float], share: float) -> np.ndarray:
    """Which documents are held out, bool [documents]: those whose hash falls below share.

    Of few documents chance may leave a side empty: then the lowest hash is held out, or the highest is trained on.

    Raises:
      ValueError: fewer than two documents.
    """
    if len(hashes) < 2:
        raise ValueError(f"source: has {len(hashes)} document(s); at least 2 are needed, to train and hold out")
    order = np.argsort(hashes, kind="stable")
    below = min(max(int(np.sum(np.asarray(hashes) < share)), 1), len(hashes) - 1)
    held_D = np.zeros(len(hashes), bool)
    held_D[order[:below]] = True
    return held_D


def _utf8_fault(path: pathlib.Path) -> tuple[str, int]:
    """("" or why the file is no UTF-8 text, its size in bytes up to there)."""
    decoder, size = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with path.open("rb") as file:
            while data := file.read(1 << 20):
                decoder.decode(data)
                size += len(data)
            decoder.decode(b"", final=True)
    except (OSError, UnicodeDecodeError) as error:
        return f"{type(error).__name__}: {error.strerror if isinstance(error, OSError) else error.reason}", size
    return "", size


def unit_hash(name: str) -> float:
    """A number in [0, 1) from the first 8 bytes of SHA-256 of a name or text."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


def fingerprint(documents: list[Document]) -> str:
    """Changes when a document is added, removed, renamed or resized."""
    listing = "\n".join(f"{document.size} {document.name}" for document in documents)
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]
