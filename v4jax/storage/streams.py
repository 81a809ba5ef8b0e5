"""Objects of a bucket or of the Hub, read from start to end.

Next file to read: v4jax/storage/uploads.py.
"""

import io
from typing import Any

from v4jax.storage.faults import retried
from v4jax.storage.remote import Remote, file_system, in_bucket

READ_BYTES = 2**20
"""Bytes that a reader asks fsspec for at once; gcsfs would ask for each line of text anew."""


def stream(place: Remote) -> io.BufferedReader:
    """The file for reading from start to end."""
    return io.BufferedReader(in_bucket(place, _Download, place), READ_BYTES)


class _Download(io.RawIOBase):
    """A file of fsspec whose reads are tried again, from where they began."""

    def __init__(self, place: Remote):
        self._place = place
        self._file = file_system(place.scheme).open(place.key, "rb", block_size=4 * READ_BYTES)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        data = retried(self._place, self._read_at, self._file.tell(), len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _read_at(self, start: int, count: int) -> bytes:
        self._file.seek(start)
        data = self._file.read(count)
        if len(data) < min(count, self._file.size - start):
            raise ConnectionError(f"the answer ended after {len(data)} of {count} bytes")
        return data

    def close(self) -> None:
        self._file.close()
        super().close()
