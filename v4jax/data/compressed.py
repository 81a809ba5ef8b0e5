"""Reads files, compressed or not, as the bytes that they contain.

Next file to read: v4jax/data/documents.py.
"""

import contextlib
import gzip
import io
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from v4jax import storage
from v4jax.storage import Place

COMPRESSED = (".gz", ".zst")
"""Suffixes of files that are decompressed while they are read."""

_CHUNK_BYTES = 2**20
_WINDOW_BYTES = 2**31
"""The widest window that `zstd --long=31` writes."""


def plain_name(name: str) -> str:
    """A file's name without its compression suffix: "a.txt" for "a.txt.gz"."""
    path = pathlib.PurePosixPath(name)
    return name[: -len(path.suffix)] if path.suffix.lower() in COMPRESSED else name


@contextlib.contextmanager
def open_data(path: Place) -> Iterator[BinaryIO]:
    """Opens a file for reading its bytes, decompressed if its name ends in .gz or .zst.

    Raises:
      ValueError: it cannot be opened, or is damaged or cut short (found while reading); names it.
      OSError: the disk fails while it is read; names it.
    """
    try:
        opened = _decompressed(path, storage.reader(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        with opened as file, failures_named(path):
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read: {said}") from error


def _decompressed(path: Place, file: BinaryIO) -> Any:
    """The contents of an open file; closing them closes the file."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return _GzipFile(fileobj=file)
    return io.BufferedReader(_ZstdFile(path, file), _CHUNK_BYTES) if suffix == ".zst" else file


class _GzipFile(gzip.GzipFile):
    """A .gz file that closes the file under it."""

    def close(self) -> None:
        file: Any = self.fileobj
        super().close()
        if file is not None:
            file.close()


@contextlib.contextmanager
def failures_named(path: Place) -> Iterator[None]:
    """Adds the path to system errors that do not name a file, such as those of reading."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def require_zstd(path: Place) -> None:
    """Raises ValueError, naming `path`, unless a package that reads .zst files is installed."""
    _zstd(path)


def _zstd(path: Place) -> tuple[Callable[[], Any], type[Exception]]:
    """(a function that makes a decompressor of one frame, the error it raises)."""
    try:
        from compression import zstd  # pyright: ignore[reportMissingImports]  (Python >= 3.14)

        options = {zstd.DecompressionParameter.window_log_max: _WINDOW_BYTES.bit_length() - 1}
        return lambda: zstd.ZstdDecompressor(options=options), zstd.ZstdError
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            f"{path}: reading .zst needs the package zstandard; pip install 'v4jax[zstd]'"
        ) from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
    return decompressor.decompressobj, zstandard.ZstdError


class _ZstdFile(io.RawIOBase):
    """The bytes of a .zst file, frame by frame.

    zstandard's own reader takes a truncated frame for a whole one.
    """

    def __init__(self, path: Place, file: BinaryIO):
        self._new, self._error = _zstd(path)
        self._file = file
        self._frame, self._packed, self._bytes = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def readinto(self, buffer) -> int:
        while not self._bytes and self._decompress():
            pass
        size = min(len(buffer), len(self._bytes))
        buffer[:size] = self._bytes[:size]
        self._bytes = self._bytes[size:]
        return size

    def _decompress(self) -> bool:
        """Decompresses some more of the file; False at its end."""
        data = self._packed or self._file.read(_CHUNK_BYTES)
        if not data:
            if self._frame is not None:
                raise EOFError("compressed file ended before the end of a frame")
            return False
        self._frame = self._frame or self._new()
        try:
            self._bytes = memoryview(self._frame.decompress(data))
        except self._error as error:
            raise EOFError(f"not a whole .zst file: {error}") from None
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
        return True
