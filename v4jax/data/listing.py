"""The files of a source as one run finds them: looked up, sampled and read only once.

Next file to read: v4jax/data/identity.py.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

from v4jax.data.compressed import COMPRESSED
from v4jax.data.config import Source
from v4jax.data.documents import Document, read_documents
from v4jax.data.files import Found, find_files
from v4jax.storage import Entry, Place, Remote

_SAMPLE_BYTES = 64 * 2**10
_READERS = 16
_LISTED = 1000
"""A source with more files than this lists none by name, so no message can name a changed one."""


@dataclasses.dataclass(frozen=True)
class Listing:
    """A source and its files; listings of the same source are equal.

    Attributes:
      stores: token stores opened from it, by cache folder and by what their tokens depend on
        (v4jax/data/store.py).
    """

    source: Source
    found: Found = dataclasses.field(compare=False)
    stores: dict[tuple[str, str], Any] = dataclasses.field(default_factory=dict, compare=False)

    @functools.cached_property
    def states(self) -> dict[Place, tuple[int, int | str]]:
        """Path -> (size in bytes, time of the last change in ns) of each file; of a bucket, tag."""
        if self.found.entries:
            return {path: (entry.size, entry.tag) for path, entry in self.found.entries.items()}
        paths = [path for _, path in self.found.files if not isinstance(path, Remote)]
        states = ((path, path.stat()) for path in paths)
        return {path: (state.st_size, state.st_mtime_ns) for path, state in states}

    @functools.cached_property
    def marks(self) -> dict[str, Any]:
        """The number of files, a digest of names, sizes and samples, and each file's mark.

        A source of more than _LISTED files leaves out the single marks.
        """
        files = sorted(self.found.files)
        if self.found.entries:
            return self._summed({name: _mark_of(self.found.entries[path]) for name, path in files})
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            marks = pool.map(_mark, [path for _, path in files])
            listed = {name: mark for (name, _), mark in zip(files, marks, strict=True)}
        return self._summed(listed)

    def _summed(self, listed: dict[str, str]) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
        shown = listed if len(listed) <= _LISTED else {}
        return {"label": self.source.label, "count": len(listed), "digest": digest, "listed": shown}

    @property
    def compressed(self) -> int:
        """How many files are compressed."""
        return sum(path.suffix.lower() in COMPRESSED for _, path in self.found.files)

    @functools.cached_property
    def documents(self) -> list[Document]:
        """The files of a source of text, each read through once."""
        return read_documents(self.source, self.found)


class Listings(dict[Source, Listing]):
    """Source -> its Listing, made on first use; one run shares one."""

    def __missing__(self, source: Source) -> Listing:
        self[source] = Listing(source, find_files(source))
        return self[source]


def _mark_of(entry: Entry) -> str:
    """The size of a file of a bucket, and its tag: what its bytes are is known without them."""
    return f"{entry.size} bytes {entry.tag}"


def _mark(path: pathlib.Path) -> str:
    """The size of a file and the SHA-256 of its first, middle and last 64 KiB."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            middle, last = max(0, (size - _SAMPLE_BYTES) // 2), max(0, size - _SAMPLE_BYTES)
            for begin in sorted({0, middle, last}):
                file.seek(begin)
                digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    return f"{size} bytes {digest.hexdigest()[:12]}"
