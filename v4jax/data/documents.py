"""Files of text as documents: found, checked, and split into those to train on and those held out.

Next file to read: v4jax/data/pieces.py.
"""

import codecs
import hashlib
import pathlib
import sysconfig
from typing import NamedTuple

from v4jax.data.config import DataConfig

_STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Document(NamedTuple):
    """One UTF-8 file: its path relative to the source, with '/' on every system; the file itself; its bytes."""

    name: str
    path: pathlib.Path
    size: int


def read_documents(cfg: DataConfig) -> list[Document]:
    """All documents of the source, sorted by name; each is read once here, to check that it is UTF-8.

    Of the standard library, files that are not UTF-8 are left out; in a folder they are an error.

    Raises:
      ValueError: no such folder, no document in it, or a file of it that is not UTF-8 text; names it.
    """
    if cfg.source == "stdlib":
        root, glob = pathlib.Path(sysconfig.get_paths()["stdlib"]), "**/*.py"
    else:
        root, glob = pathlib.Path(cfg.source).expanduser(), cfg.glob
    if not root.is_dir():
        raise ValueError(f"source: {root} is no folder; expected a folder of UTF-8 text files, or 'stdlib'")
    documents = []
    for path in root.glob(glob):
        parts = path.relative_to(root).parts
        skipped = _STDLIB_SKIPPED.intersection(parts) if cfg.source == "stdlib" else ()
        if skipped or any(part.startswith(".") for part in parts) or not path.is_file():
            continue
        fault, size = _utf8_fault(path)
        if fault and cfg.source != "stdlib":
            raise ValueError(f"source: {path} is not UTF-8 text ({fault}); remove it or narrow glob={cfg.glob!r}")
        if size and not fault:
            documents.append(Document("/".join(parts), path, size))
    if not documents:
        raise ValueError(f"source: {root} has no text in files matching {glob!r}; expected UTF-8 text files")
    return sorted(documents)


def split_documents(cfg: DataConfig, documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(train, held out): held out are the documents whose hashed name falls below cfg.held_out.

    The hash sees the name only, so a file stays on its side whatever is added beside it, on every machine. Of few
    documents chance may leave a side empty: then the lowest hash is held out, or the highest is trained on.

    Raises:
      ValueError: fewer than two documents.
    """
    if len(documents) < 2:
        raise ValueError(
            f"source: {cfg.source} has {len(documents)} document(s); at least 2 files are needed, to train and hold out"
        )
    ranked = sorted(documents, key=lambda document: _unit_hash(document.name))
    below = sum(_unit_hash(document.name) < cfg.held_out for document in ranked)
    below = min(max(below, 1), len(ranked) - 1)
    return sorted(ranked[below:]), sorted(ranked[:below])


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


def _unit_hash(name: str) -> float:
    """A number in [0, 1) from the first 8 bytes of SHA-256 of the name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


def fingerprint(documents: list[Document]) -> str:
    """Changes when a document is added, removed, renamed or resized."""
    listing = "\n".join(f"{document.size} {document.name}" for document in documents)
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]
