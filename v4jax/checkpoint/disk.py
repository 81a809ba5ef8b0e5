"""Keeps bytes that are read or written once out of the kernel's page cache.

A checkpoint is larger than memory, so what passes through once would push out everything else. A
new page can also cost more than the disk does, where the host has to give the memory back first. So
files are synced, read back and dropped from memory piece by piece.

Next file to read: v4jax/checkpoint/files.py.
"""

import concurrent.futures
import os
import pathlib
import zlib

PIECE = 64 * 2**20
"""Bytes written between two waits for the disk."""
_READ = 2**20


def forget(fd: int, start: int = 0, size: int = 0) -> None:
    """Drops `size` bytes of a file from memory, if the disk has them; 0: all from `start` on."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(fd, start, size, os.POSIX_FADV_DONTNEED)


def crc(file, once: bool = False, limit: int | None = None) -> tuple[int, int]:
    """(bytes, CRC-32) of the rest of a file opened unbuffered, or of its next `limit` bytes.

    once: the bytes will not be read again soon, so they leave the page cache.
    """
    size = found = 0
    buffer, start = memoryview(bytearray(_READ)), file.tell()
    while count := file.readinto(buffer[: _READ if limit is None else min(_READ, limit - size)]):
        found = zlib.crc32(buffer[:count], found)
        if once:
            forget(file.fileno(), start + size, count)
        size += count
    return size, found


def crc_of(path: pathlib.Path, once: bool = False) -> tuple[int, int]:
    """(bytes, CRC-32) of a whole file."""
    with open(path, "rb", buffering=0) as file:
        return crc(file, once)


def put(path: pathlib.Path) -> tuple[int, int]:
    """Syncs a file just written and drops it from memory; returns its (bytes, CRC-32)."""
    with open(path, "rb", buffering=0) as file:
        found = crc(file)
        os.fsync(file.fileno())
        forget(file.fileno())
    return found


class NewFile:
    """A file that is written from start to end, and synced and read back piece by piece.

    A thread waits for the disk and checks a piece while the next one is written; it is never more
    than one piece late. Leaving the context does the same for the rest.

    Raises:
      OSError: the disk is full, or a piece reads back other than it was written.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._file = open(path, "wb")  # noqa: SIM115
        self._back = open(path, "rb", buffering=0)  # noqa: SIM115
        self._size = self._crc = 0
        self._thread, self._putting = concurrent.futures.ThreadPoolExecutor(1), None

    def __enter__(self) -> "NewFile":
        return self

    def __exit__(self, kind, *error) -> None:
        with self._file, self._back, self._thread:  # the thread ends before the files are closed
            if kind is None:
                self._begin_put()
                self._wait()

    def write(self, data) -> None:
        """Appends `data`: bytes, or anything with a buffer of bytes."""
        data = memoryview(data)
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            self._file.write(piece)
            self._size, self._crc = self._size + len(piece), zlib.crc32(piece, self._crc)
            if self._size >= PIECE:
                self._begin_put()

    def _begin_put(self) -> None:
        self._file.flush()
        self._wait()
        self._putting = self._thread.submit(self._put, self._size, self._crc)
        self._size = self._crc = 0

    def _wait(self) -> None:
        if self._putting is not None:
            self._putting.result()

    def _put(self, size: int, written: int) -> None:
        start = self._back.tell()
        os.fsync(self._file.fileno())
        if crc(self._back, limit=size) != (size, written):
            raise OSError(
                f"{self._path} reads back other than it was written, from byte {start} on"
            )
        forget(self._file.fileno(), start, size)
