"""A store's weights, matrix by matrix: stacked arrays are read and written in slices, so that none is ever held whole.

Orbax reads and writes whole arrays; its files are zarr arrays in an OCDBT database, which TensorStore (the library that Orbax
itself uses) opens directly. A store written here is one that Orbax opens, with a checksum on every chunk.

Next file to read: v4jax/convert.py.
"""

import concurrent.futures
import os
import pathlib
import threading
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import tensorstore as ts
from flax.traverse_util import flatten_dict, unflatten_dict

from v4jax.checkpoint import disk
from v4jax.checkpoint.checksums import write_sums
from v4jax.checkpoint.names import Path, leaf_dtype, official_names, turned
from v4jax.checkpoint.store import CHECKPOINTS, Store, check_same_arrays
from v4jax.config import ModelConfig
from v4jax.model.transformer import abstract_params

_CHUNK_BYTES = 64 * 2**20
_WAIT_BYTES = 128 * 2**20
"""Written between two waits for the disk."""
_PUTTING = 4
"""Files that wait for the disk at a time: a file system takes several in one commit of its journal."""
_READ = {"cache_pool": {"total_bytes_limit": 256 * 2**20}, "file_io_mode": {"mode": "direct"}}
"""Experts of one layer may lie in one chunk, which is then decoded once and not for every expert. Files are read past the kernel's memory (see disk.py)."""


def open_leaves(directory, cfg: ModelConfig) -> dict[Path, Any]:
    """Path of each parameter of a store's newest checkpoint -> its array on disk; leaf[index] reads only what it needs.

    Raises:
      ValueError: no complete checkpoint, or one of another model (naming the first array that differs).
    """
    with Store(directory) as store:
        step = store.latest_intact(("params",), once=True)
        if step is None:
            raise ValueError(f"{directory}: no complete checkpoint")
        path = store.path(step)
    check_same_arrays(path, abstract_params(cfg))
    context = ts.Context(_READ)
    leaves = {
        where: ts.open(_spec(path, where), context=context)
        for where in flatten_dict(abstract_params(cfg))
    }
    return {where: leaf.result() for where, leaf in leaves.items()}


class StoreWriter:
    """A new store at `directory`, whose arrays start as zeros and are filled slice by slice.

    A thread waits for the disk meanwhile. Use as a context manager: leaving it ends what is under way.
    """

    def __init__(
        self, directory: pathlib.Path, cfg: ModelConfig, dtype: np.dtype, compress: bool = True
    ):
        """`dtype`: of every *.weight. `compress`: worth it for numbers that came from low precision only. A directory where this began before is taken up again, with what it holds."""
        slots = official_names(cfg)
        dtypes = {slot.path: leaf_dtype(name, dtype) for name, slot in slots.items()}
        stacked = {slot.path: len(slot.index) for slot in slots.values()}
        shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract_params(cfg)).items()}
        self._path = path = directory / CHECKPOINTS / "0"
        if not path.exists():
            with Store(
                directory, writes=True
            ) as store:  # gives Orbax's own files; the arrays are replaced by full ones
                store.save(
                    0,
                    {
                        "params": unflatten_dict(
                            {
                                path: np.zeros((1,) * len(shape), dtypes[path])
                                for path, shape in shapes.items()
                            }
                        )
                    },
                )
        self._slots, self._leaves = slots, {}
        self._waiting, self._sums, self._lock = 0, {}, threading.Lock()
        self._thread, self._putting = concurrent.futures.ThreadPoolExecutor(1), None
        context = ts.Context(
            {"file_io_sync": False}
        )  # not after each matrix: `_put` does it for many
        for where, shape in shapes.items():
            found = ts.open(_spec(path, where)).result()
            begun = (
                found.shape == shape and found.codec.to_json()["codecs"][-1]["name"] == "crc32c"
            )  # Orbax's array of one number has none
            fresh = {} if begun else create(shape, dtypes[where], stacked[where], compress)
            self._leaves[where] = ts.open(_spec(path, where) | fresh, context=context).result()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *error) -> None:
        self._thread.shutdown()

    def write(self, tensors: Iterable[tuple[str, np.ndarray]]) -> dict[str, str]:
        """Puts official tensors where they belong, in one commit if none is larger than a chunk, and reads them back.

        Returns:
          Name -> checksum of each as the store holds it.

        Raises:
          OSError: the disk is full, or gives back something else.
        """
        sums, writing, size = {}, [], 0
        try:
            for name, array in tensors:
                held = self._start(name, array, writing)
                del array  # before the next one is read
                sums[name], size = _sum(held), size + held.nbytes
        finally:
            self._wait(writing)  # also behind a failure: nothing may be written after it
        for name, one in sums.items():
            if not self.holds(name, one):
                raise OSError(f"{self._path}: {name} reads back other than it was written")
        self._written(size)
        return sums

    def _start(self, name: str, array: np.ndarray, writing: list[Any]) -> np.ndarray:
        """Begins to write a tensor, and adds to `writing` what is to be waited for; gives it as the store holds it."""
        slot = self._slots[name]
        leaf = self._leaves[slot.path]
        dtype = leaf.dtype.numpy_dtype
        held = turned(array, dtype) if slot.transpose else np.ascontiguousarray(array, dtype)
        place, rows = (
            leaf[slot.index],
            len(held) if held.ndim < 2 else leaf.chunk_layout.write_chunk.shape[-2],
        )
        for start in range(0, len(held), rows):
            band = slice(start, min(start + rows, len(held)))
            writing.append(place[band].write(held[band]))
            if len(held) > rows:  # one after the other: each is copied and compressed in memory
                self._wait(writing)
        return held

    def _wait(self, writing: list[Any]) -> None:
        try:
            while writing:
                writing.pop().result()
        except ValueError as error:  # so TensorStore calls a full disk too
            raise OSError(f"{self._path} could not be written: {error}") from error

    def _written(self, size: int) -> None:
        with self._lock:
            self._waiting += size
            if self._waiting >= _WAIT_BYTES:
                self._waiting = 0
                self._begin_put()

    def _begin_put(self) -> None:
        if self._putting is not None:  # all workers wait: nobody may write faster than the disk
            self._putting.result()
        self._putting = self._thread.submit(self._put)

    def _put(self) -> None:
        """Waits until what was written so far is on the disk, and notes its checksums."""
        new = [path for path in _data_files(self._path) if path not in self._sums]
        with concurrent.futures.ThreadPoolExecutor(_PUTTING) as pool:
            self._sums.update(zip(new, pool.map(disk.put, new), strict=True))

    def finish(self) -> None:
        """Call when all is written: puts the files on the disk and notes their checksums."""
        self._begin_put()
        self._putting.result()
        for path in self._path.rglob("*"):
            if path.is_file() and path not in self._sums:
                with open(path) as file:
                    os.fsync(file.fileno())
        write_sums(self._path, known=self._sums)

    def holds(self, name: str, checksum: str) -> bool:
        """Whether an official tensor reads back as `write` gave its checksum."""
        slot = self._slots[name]
        try:
            return _sum(self._leaves[slot.path][slot.index].read().result()) == checksum
        except ValueError:  # so TensorStore calls a damaged file
            return False


def _sum(array: np.ndarray) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8)):08x}"


def _data_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files of an OCDBT database that hold its values: each is written once, under a name of its own."""
    return [
        file for file in (path / "params" / "d").iterdir() if not file.name.endswith(".__lock")
    ]  # those are being written


def _spec(path: pathlib.Path, where: Path) -> dict[str, Any]:
    base = f"file://{path.absolute()}/params/"
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": base, "path": ".".join(where) + "/"},
    }


def create(shape: tuple[int, ...], dtype: np.dtype, stacked: int, compress: bool) -> dict[str, Any]:
    """TensorStore's words for a new array: a chunk holds (part of) one matrix of the `stacked` axes."""
    matrix = list(shape[stacked:])
    if len(matrix) > 1:
        matrix[0] = min(matrix[0], max(1, _CHUNK_BYTES // (dtype.itemsize * matrix[1])))
    chunk = [1] * stacked + matrix
    # Numbers from low precision have few bits that differ: sorted by bit, lz4 finds nearly what zstd finds, much faster.
    blosc = {
        "name": "blosc",
        "configuration": {
            "cname": "lz4",
            "clevel": 1,
            "shuffle": "bitshuffle",
            "typesize": dtype.itemsize,
        },
    }
    codecs = [{"name": "bytes"}, *([blosc] if compress else []), {"name": "crc32c"}]
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    metadata = {
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": grid,
        "codecs": codecs,
        "fill_value": 0.0,
    }
    return {"create": True, "delete_existing": True, "metadata": metadata}
