"""Plans which tensors go into which safetensors files, and writes them, several at once.

Next file to read: v4jax/checkpoint/config_json.py.
"""

import collections
import concurrent.futures
import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import numpy as np

from v4jax import storage
from v4jax.checkpoint.atomic import write_json
from v4jax.checkpoint.carried import CARRIED, bytes_of, grouped, stored_as_is
from v4jax.checkpoint.files import INDEX_FILE, Header, file_size, tensor_size, write_file
from v4jax.checkpoint.formats import DTYPES, Kind, Stored, shapes_of
from v4jax.checkpoint.memory_budget import MemoryBudget
from v4jax.checkpoint.names import official_shapes
from v4jax.config import ModelConfig
from v4jax.storage import Place, is_remote

MAX_FILE_BYTES = 5 * 10**9
BUDGET = 10**9
"""Bytes that all workers of a conversion use for small tensors. A larger tensor runs alone."""
Files = dict[str, dict[str, tuple[str, tuple[int, ...]]]]
"""File name -> its tensors, scales included -> (dtype, shape)."""


def plan_files(
    cfg: ModelConfig,
    kinds: Mapping[str, Kind],
    max_file_bytes: int = MAX_FILE_BYTES,
    carried: Mapping[str, Header] | None = None,
) -> Files:
    """File name -> its tensors: all in order, cut into files of at most `max_file_bytes`.

    carried: tensors that are written as they are, after those of the trunk.
    """
    tensors: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for name, shape in official_shapes(cfg).items():
        kind = kinds[name]
        data, scale = shapes_of(kind, shape)
        tensors[name] = {name: (kind.dtype, data)}
        if kind.scale is not None and scale is not None:
            tensors[name][scale_name(name)] = (kind.scale, scale)
    return _cut(tensors | _as_is(carried or {}), max_file_bytes)


def carry(carried: Mapping[str, Header], folder: Place) -> int:
    """Copies carried tensors into a run or store, one in memory at a time; returns their bytes."""
    if carried:
        target = folder / CARRIED
        storage.make_folder(target)
        files = _cut(_as_is(carried), MAX_FILE_BYTES)
        write_tensors(target, files, lambda name: stored_as_is(carried, name))
    return bytes_of(carried)


def _as_is(carried: Mapping[str, Header]) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """Name -> the tensor and its scales -> (dtype, shape)."""
    return {
        name: {one: (header.dtype, header.shape) for one, header in parts.items()}
        for name, parts in grouped(carried).items()
    }


def _cut(tensors: dict[str, dict[str, tuple[str, tuple[int, ...]]]], max_file_bytes: int) -> Files:
    """Tensors in order, those with scales together, cut into files."""
    sizes = {
        name: sum(tensor_size(*one) for one in parts.values()) for name, parts in tensors.items()
    }
    pieces = split(sizes, max_file_bytes)
    files = {}
    for i, names in enumerate(pieces, start=1):
        file = (
            "model.safetensors"
            if len(pieces) == 1
            else f"model-{i:05}-of-{len(pieces):05}.safetensors"
        )
        files[file] = {part: one for name in names for part, one in tensors[name].items()}
    return files


def working_bytes(shape: tuple[int, ...], before: Kind, after: Kind) -> int:
    """Bytes of memory that the conversion of one tensor takes.

    The tensor is held as it was and as it becomes; with low precision also as float32 and
    transposed.
    """
    low = before.scale is not None or after.scale is not None
    return math.prod(shape) * (
        12 if low else DTYPES[before.dtype].itemsize + DTYPES[after.dtype].itemsize
    )


def total_bytes(files: Files) -> int:
    """Bytes of all tensors of a plan."""
    return sum(tensor_size(*one) for tensors in files.values() for one in tensors.values())


def write_tensors(
    directory: Place,
    files: Files,
    stored: Callable[[str], Stored],
    wrote: Callable[[int], None] = lambda size: None,
    workers: int = 1,
    memory_for: Callable[[str], int] = lambda name: 0,
) -> None:
    """Writes the files of a plan and, if there are several, their index.

    A file that exists already is taken to be whole; in a bucket, if it has the right size.

    Args:
      stored: official name -> its tensor.
      wrote: called with the bytes of each piece written or found.
      workers: files written at once.
      memory_for: official name -> bytes of memory it takes, which the workers share.
    """
    budget = MemoryBudget(BUDGET)

    def held(name: str) -> tuple[Stored, Callable[[], None]]:
        """A tensor, and a function that gives its memory back."""
        with contextlib.ExitStack() as hold:
            hold.enter_context(budget.take(memory_for(name)))
            return stored(name), hold.pop_all().close

    def write(file: str, tensors) -> None:
        if _is_whole(directory / file, tensors):
            wrote(total_bytes({file: tensors}))
            return
        names = [name for name in tensors if not _is_scale(name, tensors)]
        made = (held(name) for name in names) if workers == 1 else _ahead(held, names)
        # Closing both gives memory back after a failure, for which others may wait.
        with contextlib.closing(made), contextlib.closing(_parts(names, made)) as parts:
            write_file(directory / file, tensors, parts, wrote)

    if workers == 1:
        for file, tensors in files.items():
            write(file, tensors)
    else:
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            running = [pool.submit(write, file, tensors) for file, tensors in files.items()]
            try:
                for one in concurrent.futures.as_completed(running):
                    one.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    if len(files) > 1:
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        write_json(
            directory / INDEX_FILE,
            {"metadata": {"total_size": total_bytes(files)}, "weight_map": weight_map},
        )


def _is_whole(path: Place, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bool:
    """Whether an earlier try wrote this file."""
    if not is_remote(path):
        return path.exists()
    return path.is_file() and storage.size(path) == file_size(tensors)


def _ahead(
    held: Callable[[str], tuple[Stored, Callable[[], None]]], names: list[str]
) -> Generator[tuple[Stored, Callable[[], None]], None, None]:
    """map(held, names), with the next one made in a thread while one is in use."""
    coming = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            for i in range(len(names)):
                coming.extend(pool.submit(held, name) for name in names[i + len(coming) : i + 2])
                yield coming.popleft().result()
        finally:
            for one in coming:
                if not one.cancel() and one.exception() is None:
                    one.result()[1]()


def _parts(
    names: list[str], made: Iterator[tuple[Stored, Callable[[], None]]]
) -> Generator[tuple[str, np.ndarray], None, None]:
    for name in names:
        tensor, done = next(made)
        try:
            yield name, tensor.data
            if tensor.scale is not None:
                yield scale_name(name), tensor.scale
        finally:
            del tensor  # before the next one is read
            done()


def scale_name(name: str) -> str:
    """layers.0.attn.wkv.weight -> layers.0.attn.wkv.scale."""
    return name.removesuffix("weight") + "scale"


def _is_scale(name: str, tensors: Mapping[str, Any]) -> bool:
    return name.endswith(".scale") and name.removesuffix("scale") + "weight" in tensors


def split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into pieces of at most `limit` bytes.

    Example: {"a": 3, "b": 3, "c": 9} with limit 6 gives [[a, b], [c]].
    """
    pieces: list[list[str]] = [[]]
    budget = limit
    for name, size in sizes.items():
        if pieces[-1] and size > budget:
            pieces.append([])
            budget = limit
        pieces[-1].append(name)
        budget -= size
    return pieces
