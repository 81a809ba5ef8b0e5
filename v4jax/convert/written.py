"""Which tensors an unfinished conversion to a store has written, with their checksums.

Next file to read: v4jax/convert/progress.py.
"""

import threading
from collections.abc import Mapping

from v4jax import storage
from v4jax.storage import Place, Remote

_LOG = "written.txt"
_PIECES = "written"


class WrittenLog:
    """A file that grows; in a bucket, where none can, a folder of small ones."""

    def __init__(self, partial: Place):
        self._partial, self._lock = partial, threading.Lock()

    def read(self) -> dict[str, str]:
        """Official name -> checksum, of what earlier tries wrote."""
        texts = [storage.read(path).decode() for path in self._files()]
        lines = [line for text in texts for line in text.splitlines() if line.count(" ") == 1]
        return dict(line.split() for line in lines)

    def add(self, sums: Mapping[str, str]) -> None:
        """Notes tensors that the store has. Threads may call it."""
        if not sums:
            return
        text = "".join(f"{name} {one}\n" for name, one in sums.items())
        if isinstance(self._partial, Remote):
            storage.write(self._partial / _PIECES / f"{next(iter(sums))}.txt", text.encode())
            return
        with self._lock, open(self._partial / _LOG, "a") as file:
            file.write(text)

    def remove(self) -> None:
        """Forgets everything."""
        for path in self._files():
            storage.remove(path)

    def _files(self) -> list[Place]:
        if isinstance(self._partial, Remote):
            folder = self._partial / _PIECES
            return [folder / name for name in storage.listing(folder)]
        log = self._partial / _LOG
        return [log] if log.exists() else []
