"""Reads and writes safetensors files one tensor at a time.

The safetensors library checks every header, and that the file has the length its header implies.
Bytes are read and written here: the library has no 8-bit floats in NumPy, and writes only tensors
that are all in memory.

Next file to read: v4jax/checkpoint/names.py.
"""

import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from v4jax.checkpoint import disk
from v4jax.checkpoint.formats import DTYPES
from v4jax.untrusted import file_in, parse_json, read_json

INDEX_FILE = "model.safetensors.index.json"


class Header(NamedTuple):
    """Where a tensor is: `stored` is its name in the file, `start` its first byte.

    `dtype` is the name that safetensors uses, such as "BF16".
    """

    path: pathlib.Path
    stored: str
    shape: tuple[int, ...]
    dtype: str
    start: int


def read_headers(directory: pathlib.Path) -> dict[str, Header]:
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
    for name in files:
        for header in headers_of(_file(directory, name)):
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


def headers_of(path: pathlib.Path) -> list[Header]:
    """The headers of all tensors of one file.

    Raises:
      ValueError: not a safetensors file, or one cut short.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            raw = parse_json(file.read(size))  # the library accepts a name that occurs twice
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path.name}: not a readable safetensors file: {error}") from None
    raw.pop("__metadata__", None)
    return [
        Header(path, name, tuple(one["shape"]), one["dtype"], 8 + size + one["data_offsets"][0])
        for name, one in raw.items()
    ]


def read_tensor(header: Header, once: bool = False) -> np.ndarray:
    """One tensor in its stored form. once: it will not be read again soon (checkpoint/disk.py)."""
    array = np.empty(header.shape, DTYPES[header.dtype])
    with open(header.path, "rb", buffering=0) as file:
        file.seek(header.start)
        left = array.reshape(-1).view(np.uint8).data
        while left and (count := file.readinto(left)):  # one call reads at most 2 GB
            left = left[count:]
        if left:
            raise ValueError(f"{header.path.name}: ends within {header.stored}")
        if once:
            disk.forget(file.fileno(), header.start, array.nbytes)
    return array


def write_file(
    path: pathlib.Path,
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
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(table, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    partial = path.with_name(path.name + ".tmp")
    try:
        with disk.NewFile(partial) as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for (name, planned), (got, array) in zip(tensors.items(), arrays, strict=True):
                if (got, dtype_name(array.dtype), array.shape) != (name, *planned):
                    raise AssertionError(
                        f"got {got} {dtype_name(array.dtype)} {array.shape}; planned was {name} "
                        f"{planned}"
                    )
                data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                file.write(data)
                wrote(data.size)
                del array, data  # before the next one is made
    except OSError as error:
        raise OSError(
            error.errno, f"{partial} could not be written: {error.strerror or error}"
        ) from error
    if len(headers_of(partial)) != len(tensors):
        raise OSError(f"{partial}: reads back with other tensors than were written")
    partial.rename(path)


def dtype_name(dtype: np.dtype) -> str:
    """The name that safetensors gives a dtype."""
    return next(name for name, own in DTYPES.items() if own == dtype)


def _read_index(directory: pathlib.Path) -> dict[str, str] | None:
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


def _file(directory: pathlib.Path, name: str) -> pathlib.Path:
    try:
        return file_in(directory, name)
    except FileNotFoundError:
        raise ValueError(f"{INDEX_FILE}: names {name}, which does not exist") from None
