"""Reads and writes safetensors files one tensor at a time.

The safetensors library checks every header, and that the file has the length its header implies.
Bytes are read and written here: the library has no 8-bit floats in NumPy, and writes only tensors
that are all in memory.

Next file to read: v4jax/checkpoint/names.py.
"""

import concurrent.futures
import contextlib
import json
import math
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from v4jax import storage
from v4jax.checkpoint import disk
from v4jax.checkpoint.formats import DTYPES
from v4jax.storage import Place, Remote
from v4jax.untrusted import file_in, parse_json, read_json

INDEX_FILE = "model.safetensors.index.json"
_HEAD_GUESS = 2**17
"""Bytes read of a file first; more are read if its header is longer."""
_LONGEST_HEAD = 2**27
"""Bytes. The library takes at most 100 MB."""
_READERS = 8
"""Files whose headers are read at once, which counts in a bucket."""


class Header(NamedTuple):
    """Where a tensor is: `stored` is its name in the file, `start` its first byte.

    `dtype` is the name that safetensors uses, such as "BF16".
    """

    path: Place
    stored: str
    shape: tuple[int, ...]
    dtype: str
    start: int


def read_headers(directory: Place) -> dict[str, Header]:
    """Name in the file -> header, of the one file or of all files that the index names.

    Raises:
      ValueError: a file that cannot be read, or an index that does not fit the files.
    """
    weight_map = _read_index(directory)
    if weight_map is None:
        files = sorted(
            path.name for path in directory.iterdir() if path.name.endswith(".safetensors")
        )
        if len(files) != 1:
            raise ValueError(
                f"got {len(files)} *.safetensors files and no {INDEX_FILE}; expected one, or an "
                "index"
            )
    else:
        files = sorted(set(weight_map.values()))
    tensors = {}
    paths = [_file(directory, name) for name in files]
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(headers_of, paths))
    for name, headers in zip(files, found, strict=True):
        for header in headers:
            if weight_map is not None and weight_map.get(header.stored) != name:
                raise ValueError(
                    f"{name}: holds {header.stored}, which {INDEX_FILE} places in "
                    f"{weight_map.get(header.stored)}"
                )
            tensors[header.stored] = header
    for stored, name in (weight_map or {}).items():
        if stored not in tensors:
            raise ValueError(f"{name}: lacks {stored}, which {INDEX_FILE} places there")
    return tensors


def headers_of(path: Place) -> list[Header]:
    """The headers of all tensors of one file.

    Raises:
      ValueError: not a safetensors file, or one cut short.
    """
    try:
        head = _head(path)
        with _checkable(path, head) as local, safe_open(local, framework="numpy"):
            pass
        size = len(head) - 8
        raw = parse_json(head[8:])  # the library accepts a name that occurs twice
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path.name}: not a readable safetensors file: {error}") from None
    raw.pop("__metadata__", None)
    return [
        Header(path, name, tuple(one["shape"]), one["dtype"], 8 + size + one["data_offsets"][0])
        for name, one in raw.items()
    ]


def _head(path: Place) -> bytes:
    """The first 8 bytes of a file and as many after them as they say, if the file has these."""
    first = storage.read(path, 0, _HEAD_GUESS)
    size = 8 + int.from_bytes(first[:8], "little")
    if size <= len(first):
        return first[:size]
    return first + storage.read(path, len(first), min(size, _LONGEST_HEAD) - len(first))


@contextlib.contextmanager
def _checkable(path: Place, head: bytes) -> Iterator[pathlib.Path]:
    """The file, for the library to check; a bucket's as its head before a hole of its size."""
    if not isinstance(path, Remote):
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=path.suffix) as file:
        file.write(head)
        file.truncate(storage.size(path))
        file.flush()
        yield pathlib.Path(file.name)


def read_rows(header: Header, first: int, last: int) -> np.ndarray:
    """Rows `first` to `last` of a tensor, in stored form."""
    row = math.prod(header.shape[1:]) * DTYPES[header.dtype].itemsize
    array = np.empty((last - first, *header.shape[1:]), DTYPES[header.dtype])
    storage.read_into(header.path, header.start + first * row, _bytes_of(array))
    return array


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def read_tensor(header: Header, once: bool = False) -> np.ndarray:
    """One tensor in its stored form. once: it will not be read again soon (checkpoint/disk.py)."""
    array = np.empty(header.shape, DTYPES[header.dtype])
    if isinstance(header.path, Remote):
        storage.read_into(header.path, header.start, _bytes_of(array))
        return array
    with open(header.path, "rb", buffering=0) as file:
        file.seek(header.start)
        left = _bytes_of(array)
        while left and (count := file.readinto(left)):  # one call reads at most 2 GB
            left = left[count:]
        if left:
            raise ValueError(f"{header.path.name}: ends within {header.stored}")
        if once:
            disk.forget(file.fileno(), header.start, array.nbytes)
    return array


def write_file(
    path: Place,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    arrays: Iterator[tuple[str, np.ndarray]],
    wrote: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes a safetensors file with one tensor in memory at a time.

    The file appears whole and read back, or not at all.

    Args:
      tensors: name -> (dtype, shape), in the order of `arrays`.
      wrote: called with the bytes of each tensor written.

    Raises:
      OSError: the disk is full, or gives back other bytes than were written.
    """
    if isinstance(path, Remote):
        with storage.writer(path) as file:
            _write_to(file, tensors, arrays, wrote)
        return
    partial = path.with_name(path.name + ".tmp")
    try:
        with disk.NewFile(partial) as file:
            _write_to(file, tensors, arrays, wrote)
    except OSError as error:
        raise OSError(
            error.errno, f"{partial} could not be written: {error.strerror or error}"
        ) from error
    if len(headers_of(partial)) != len(tensors):
        raise OSError(f"{partial}: reads back with other tensors than were written")
    partial.rename(path)


def file_size(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of the file that write_file makes of these tensors."""
    return len(_head_of(tensors)) + sum(tensor_size(*one) for one in tensors.values())


def _head_of(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The bytes before the tensors: the header's length, and the header."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + tensor_size(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(table, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def tensor_size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def _write_to(
    file: Any,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    arrays: Iterator[tuple[str, np.ndarray]],
    wrote: Callable[[int], None],
) -> None:
    """Writes header and tensors, one at a time."""
    file.write(_head_of(tensors))
    for (name, planned), (got, array) in zip(tensors.items(), arrays, strict=True):
        if (got, dtype_name(array.dtype), array.shape) != (name, *planned):
            raise AssertionError(
                f"got {got} {dtype_name(array.dtype)} {array.shape}; planned was {name} {planned}"
            )
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        file.write(data)
        wrote(data.size)
        del array, data  # before the next one is made


def dtype_name(dtype: np.dtype) -> str:
    """The name that safetensors gives a dtype."""
    return next(name for name, own in DTYPES.items() if own == dtype)


def _read_index(directory: Place) -> dict[str, str] | None:
    """Tensor -> file, of model.safetensors.index.json; None without that file."""
    try:
        raw = read_json(file_in(directory, INDEX_FILE))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(
            f'{INDEX_FILE}: expected a JSON object with "weight_map": tensor -> file; {error}'
        ) from None
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f'{INDEX_FILE}: expected a JSON object with "weight_map": tensor -> file')
    for name in weight_map.values():
        if not isinstance(name, str):
            raise ValueError(
                f"{INDEX_FILE}: got file {name!r}; must be a file name in this directory"
            )
    files = set(weight_map.values())
    for name in sorted(files):
        _file(directory, name)
    if "model.safetensors" not in files and (directory / "model.safetensors").exists():
        raise ValueError(
            f"got model.safetensors, and {INDEX_FILE} that does not name it; remove the one not "
            "meant"
        )
    return weight_map


def _file(directory: Place, name: str) -> Place:
    try:
        return file_in(directory, name)
    except FileNotFoundError:
        raise ValueError(f"{INDEX_FILE}: names {name}, which does not exist") from None
