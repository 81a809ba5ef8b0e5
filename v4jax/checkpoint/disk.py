"""Bytes that pass through once: put on the disk, and out of the memory that the kernel keeps files in, as a conversion goes.

A checkpoint is larger than memory, and what is read or written once pushes out everything else. Where memory that was free has to be
asked back from a host, a new page also costs more than the disk: 0.3 GB/s into new pages, 1.7 into pages that are used again
(measured on a virtual machine). And what is read back afterwards comes from the disk, which is what a check is for.

Next file to read: v4jax/checkpoint/files.py.
"""

import os
import pathlib
import zlib

PIECE = 64 * 2**20
"""Bytes between two waits for the disk."""
_READ = 2**20


def put(fd: int) -> None:
    """Waits until what was written to a file is on the disk, and lets go of its pages."""
    os.fsync(fd)
    forget(fd)


def forget(fd: int, start: int = 0, size: int = 0) -> None:
    """Lets go of the pages of `size` bytes of a file (0: all from `start` on) that are on the disk."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(fd, start, size, os.POSIX_FADV_DONTNEED)


def crc(file, size: int = -1, once: bool = True) -> tuple[int, int]:
    """(bytes, CRC-32) of the next `size` bytes of a file opened unbuffered (-1: all that follow). `once`: lets go of their pages."""
    got = found = 0
    buffer = memoryview(bytearray(_READ))
    start = file.tell()
    while count := file.readinto(buffer[: _READ if size < 0 else min(_READ, size - got)]):
        found = zlib.crc32(buffer[:count], found)
        if once:
            forget(file.fileno(), start + got, count)
        got += count
    return got, found


def crc_of(path: pathlib.Path, once: bool = False) -> tuple[int, int]:
    """(bytes, CRC-32) of a file."""
    with open(path, "rb", buffering=0) as file:
        return crc(file, once=once)
