"""Bytes that pass through once: put on the disk, read back, and out of the memory that the kernel keeps files in, as a conversion goes.

A checkpoint is larger than memory, and what is read or written once pushes out everything else. Where memory that was free has to be
asked back from a host, a new page also costs more than the disk: 0.3 GB/s into new pages, 1.7 into pages that are used again
(measured on a virtual machine).

Next file to read: v4jax/checkpoint/files.py.
"""

import concurrent.futures
import math
import os
import pathlib
import zlib

PIECE = 64 * 2**20
"""Bytes between two waits for the disk."""
_READ = 2**20


def forget(fd: int, start: int = 0, size: int = 0) -> None:
    """Lets go of the pages of `size` bytes of a file (0: all from `start` on) that are on the disk."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(fd, start, size, os.POSIX_FADV_DONTNEED)


def crc(file, once: bool = False, limit: float = math.inf) -> tuple[int, int]:
    """(bytes, CRC-32) of what follows in a file opened unbuffered, or of its first `most` bytes. `once`: nobody reads it again soon."""
    size = found = 0
    buffer, start = memoryview(bytearray(_READ)), file.tell()
    while count := file.readinto(buffer[: min(_READ, limit - size)]):
        found = zlib.crc32(buffer[:count], found)
        if once:
            forget(file.fileno(), start + size, count)
        size += count
    return size, found


def crc_of(path: pathlib.Path, once: bool = False) -> tuple[int, int]:
    """(bytes, CRC-32) of a file."""
    with open(path, "rb", buffering=0) as file:
        return crc(file, once)


def put(path: pathlib.Path) -> tuple[int, int]:
    """(bytes, CRC-32) of a file just written, which is on the disk afterwards and out of memory."""
    with open(path, "rb", buffering=0) as file:
        found = crc(file)
        os.fsync(file.fileno())
        forget(file.fileno())
    return found


class NewFile:
    """A file written from its beginning to its end, and put on the disk piece by piece. Leaving it puts the rest there.

    A thread waits for the disk and reads a piece back while the next one is written, never more than one behind.

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
        with self._file, self._back, self._thread:  # which ends before they are closed
            if kind is None:
                self._begin_put()
                self._wait()

    def write(self, data) -> None:
        """`data`: bytes, or anything like them."""
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
