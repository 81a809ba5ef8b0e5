"""Reads and writes files wherever they are: whole, in ranges, by line, as a stream.

What is written appears whole or not at all, on a disk and in a bucket.

Next file to read: v4jax/storage/claim.py.
"""

import concurrent.futures
import contextlib
import functools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from v4jax.storage.places import Place
from v4jax.storage.remote import Remote, file_system, in_bucket, info, read_range, tag_of, tree
from v4jax.storage.streams import stream
from v4jax.storage.uploads import Upload, begin_upload

PIECE_BYTES = 16 * 2**20
"""Bytes of a range request. More are several requests, at most READERS at once in a process."""
READERS = 8
_TRIES = 3


class Entry(NamedTuple):
    """A file of a listing: bytes, and a tag that changes with them.

    The tag is the time of change on a disk, crc32c on gs, ETag on s3, a hash on the Hub.
    """

    size: int
    tag: str


# ---- read ----------------------------------------------------------------------------------------


def size(path: Place) -> int:
    """The file's bytes. Raises FileNotFoundError if there is no such file."""
    if not isinstance(path, Remote):
        return path.stat().st_size
    return _entry(path).size


def exists(path: Place) -> bool:
    """Whether there is a file or a folder, or on a disk a link that leads nowhere."""
    return path.exists() if isinstance(path, Remote) else os.path.lexists(path)


def read(path: Place, start: int = 0, count: int | None = None) -> bytes:
    """`count` bytes of a file from byte `start` on, less at its end; None: all.

    Raises:
      FileNotFoundError, PermissionError, OSError: naming the file.
    """
    if isinstance(path, Remote):
        if count is None:
            return path.read_bytes()[start:]
        return read_range(path, start, start + count) if count else b""
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(-1 if count is None else count)


def read_into(path: Place, start: int, buffer: Any) -> None:
    """Fills `buffer` from byte `start` of a file; of a bucket's by several requests if it is large.

    Raises:
      OSError: the file ends within the range, or see `read`.
    """
    view = memoryview(buffer).cast("B")
    if not isinstance(path, Remote):
        _read_local(path, start, view)
        return
    firsts = range(0, len(view), PIECE_BYTES)
    if len(firsts) == 1:
        _read_piece(path, start, view)
        return
    pieces = [view[first : first + PIECE_BYTES] for first in firsts]
    starts = [start + first for first in firsts]
    for one in _readers().map(_read_piece, [path] * len(pieces), starts, pieces):
        assert one is None


def _read_local(path: pathlib.Path, start: int, view: memoryview) -> None:
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while view and (count := file.readinto(view)):  # one call reads at most 2 GB
            view = view[count:]
    if view:
        raise OSError(f"{path}: ends {len(view)} bytes too early")


def _read_piece(path: Remote, start: int, view: memoryview) -> None:
    for _ in range(_TRIES):
        data = read_range(path, start, start + len(view))
        if len(data) == len(view):
            view[:] = data
            return
    raise OSError(f"{path}: ends {len(view) - len(data)} bytes too early")


def reader(path: Place) -> BinaryIO:
    """The file, opened for reading bytes from start to end."""
    return stream(path) if isinstance(path, Remote) else open(path, "rb")


def lines(path: Place) -> Iterator[bytes]:
    """The lines of a file, each with the byte that ends it."""
    with reader(path) as file:
        yield from file


def listing(folder: Place) -> dict[str, Entry]:
    """Name below `folder` -> Entry, of all files in it and in its folders, sorted; {} without it.

    Raises:
      ValueError: there is no such bucket.
      OSError: see `read`.
    """
    if isinstance(folder, Remote):
        return {name: Entry(*one) for name, one in tree(folder).items()}
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            stat = path.stat()
            found[str(path.relative_to(folder))] = Entry(stat.st_size, str(stat.st_mtime_ns))
    return found


# ---- write ---------------------------------------------------------------------------------------


def write(path: Place, content: bytes) -> None:
    """Writes a file whole or not at all; on a disk its folder must exist.

    Raises:
      OSError: see `read`; the disk is full.
    """
    if isinstance(path, Remote):
        in_bucket(path, file_system(path.scheme).pipe_file, path.key, content)
        return
    with writer(path) as file:
        file.write(content)


@contextlib.contextmanager
def writer(path: Place) -> Iterator[Any]:
    """A file to `write` bytes to, which appears when the context ends without an error.

    Raises:
      OSError: see `write`.
    """
    if isinstance(path, Remote):
        with _uploading(path) as upload:
            yield upload
        return
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=path.name, suffix=".tmp", delete=False
    ) as file:
        try:
            yield file
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # temporary files are private
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            pathlib.Path(file.name).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _uploading(path: Remote) -> Iterator[Upload]:
    upload = begin_upload(path)
    try:
        yield upload
        upload.commit()
    except BaseException:
        upload.discard()
        raise


def make_folder(path: Place) -> None:
    """Makes a folder and those above it on a disk; in a bucket a folder is there once it is used.

    Raises:
      OSError: no permission, or a file of that name.
    """
    if not isinstance(path, Remote):
        path.mkdir(parents=True, exist_ok=True)


def copy(source: Place, target: Place) -> None:
    """Copies a file; within a store the store does it.

    Raises:
      OSError: see `read` and `write`.
    """
    if isinstance(source, Remote) and isinstance(target, Remote) and source.scheme == target.scheme:
        in_bucket(source, file_system(source.scheme).cp_file, source.key, target.key)
        return
    with reader(source) as file, writer(target) as new:
        shutil.copyfileobj(file, new, PIECE_BYTES)


def move_folder(source: Place, target: Place, first: str) -> None:
    """Moves a folder; on a disk by renaming it.

    In a bucket each object is copied, `first` before the others, and then removed, `first` before
    the others. So whatever counts only with the file `first` in it never counts twice, or in part.

    Raises:
      OSError: see `read` and `write`.
    """
    if not isinstance(source, Remote):
        assert not isinstance(target, Remote)
        make_folder(target.parent)
        source.rename(target)
        return
    names = sorted(listing(source), key=lambda name: (name != first, name))
    for name in names:
        copy(source / name, target / name)
    for name in names:
        remove(source / name)


def remove_folder(path: Place, first: str) -> None:
    """Removes a folder with all that is in it; in a bucket `first` before the others.

    So whatever counts only with the file `first` in it counts no more once anything is gone.
    Whoever is stopped in between may call it again. Nothing happens if there is none.

    Raises:
      OSError: see `write`.
    """
    if not isinstance(path, Remote):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)
        return
    remove(path / first)
    list(_readers().map(remove, [path / name for name in listing(path)]))


def remove(path: Place) -> None:
    """Removes a file; nothing happens if there is none."""
    if not isinstance(path, Remote):
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(FileNotFoundError):
        in_bucket(path, file_system(path.scheme).rm_file, path.key)


# ---- helpers -------------------------------------------------------------------------------------


def _entry(path: Remote) -> Entry:
    found = info(path)
    if found is None or found["type"] != "file":
        raise FileNotFoundError(f"{path}: no such object")
    return Entry(found["size"], tag_of(found))


@functools.cache
def _readers() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(READERS, "v4jax-ranges")


def _umask() -> int:
    """The process's permission mask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
