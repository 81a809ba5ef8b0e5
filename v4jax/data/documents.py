"""Files of text as documents: found, checked, and split into training and held-out ones.

Axes: M documents.

Next file to read: v4jax/data/records.py.
"""

import codecs
import hashlib
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from v4jax.data.compressed import open_data, plain_name
from v4jax.data.config import DataConfig, Source
from v4jax.data.files import Found, find_files, nothing_found
from v4jax.data.places import at
from v4jax.storage import Place

BYTE_ORDER_MARK = "\ufeff"
"""What some programs write before a text; no part of it."""


class Document(NamedTuple):
    """One UTF-8 file.

    Attributes:
      name: its path relative to the source, with '/' on every system.
      size, crc: bytes and CRC-32 of its text, after decompression.
    """

    name: str
    path: Place
    size: int
    crc: int = 0

    def text(self) -> str:
        """The whole text, without a byte order mark."""
        with open_data(self.path) as file:
            data = file.read()
        with at(str(self.path)):
            return data.decode("utf-8").removeprefix(BYTE_ORDER_MARK)


def read_documents(source: Source, found: Found | None = None) -> list[Document]:
    """All documents of a source of text files, sorted by name, each checked to be UTF-8.

    The check reads every file once. Files that are not UTF-8 are left out of the standard library;
    in a folder they are an error.

    Args:
      found: the source's files; None: look them up.

    Raises:
      ValueError: no such folder, no document in it, or a file of it that is not UTF-8 text; names
        it.
    """
    found = find_files(source) if found is None else found
    documents = []
    for name, path in found.files:
        size, crc, fault = _read_through(path)
        if fault and source.path != "stdlib":
            raise ValueError(
                f"source: {path} is not UTF-8 text ({fault}); "
                f"remove it or narrow glob={source.glob!r}"
            )
        if size and not fault:
            documents.append(Document(name, path, size, crc))
    if not documents:
        raise nothing_found(source, found)
    return sorted(documents)


def split_documents(
    cfg: DataConfig, documents: list[Document]
) -> tuple[list[Document], list[Document]]:
    """(train, held out), by the hash of each document's name.

    So a file stays on its side even when others are added.

    Raises:
      ValueError: fewer than two documents.
    """
    held_M = held_out_of([name_hash(document) for document in documents], cfg.held_out)
    sides = [
        [document for document, held in zip(documents, held_M, strict=True) if held == side]
        for side in (False, True)
    ]
    return sides[0], sides[1]


def held_out_of(hashes: Sequence[float] | np.ndarray, share: float) -> np.ndarray:
    """Which documents are held out, bool [M]: those whose hash is below `share`.

    With few documents, one side may be empty by chance. Then the lowest hash is held out, or the
    highest is trained on. Documents of one hash are on one side, unless there is no other hash.

    Raises:
      ValueError: fewer than two documents.
    """
    if len(hashes) < 2:
        raise ValueError(
            f"source: has {len(hashes)} document(s); at least 2 are needed, to train and hold out"
        )
    order = np.argsort(hashes, kind="stable")
    below = min(max(int(np.sum(np.asarray(hashes) < share)), 1), len(hashes) - 1)
    ordered = np.asarray(hashes)[order]
    first, end = (int(np.searchsorted(ordered, ordered[below - 1], at)) for at in ("left", "right"))
    if end < len(hashes):
        below = end
    elif first > 0:
        below = first
    held_M = np.zeros(len(hashes), bool)
    held_M[order[:below]] = True
    return held_M


def _read_through(path: Place) -> tuple[int, int, str]:
    """(size in bytes, CRC-32, why it is not UTF-8 or "") of a file's text."""
    decoder, size, crc = codecs.getincrementaldecoder("utf-8")(), 0, 0
    with open_data(path) as file:
        while True:
            data = file.read(1 << 20)
            begin = size - len(decoder.getstate()[0])  # some bytes wait for the rest of a character
            try:
                decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                return size, crc, f"byte {begin + error.start}: {error.reason}"
            if not data:
                return size, crc, ""
            size += len(data)
            crc = zlib.crc32(data, crc)


def name_hash(document: Document) -> float:
    """`unit_hash` of its name without a compression suffix.

    So a file keeps its side of the split when it is compressed.
    """
    return unit_hash(plain_name(document.name))


def unit_hash(name: str) -> float:
    """A number in [0, 1) from the first 8 bytes of the SHA-256 of a name or text."""
    return (
        int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
        / 2**64
    )


def fingerprint(documents: list[Document]) -> str:
    """A hash that changes when a document is added, removed, renamed or resized.

    Checkpoints of older versions have no other mark of their data.
    """
    listing = "\n".join(f"{document.size} {document.name}" for document in documents)
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def content(documents: list[Document]) -> str:
    """A checksum that changes with every byte of every document."""
    return f"{zlib.crc32(' '.join(str(document.crc) for document in documents).encode()):08x}"
