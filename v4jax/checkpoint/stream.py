"""Reads and writes a store's weights one matrix at a time, so no stacked array is held whole.

Orbax reads and writes whole arrays. Its files are zarr arrays in an OCDBT database, which
TensorStore, the library inside Orbax, opens directly. Orbax opens a store written here, which has a
checksum on every chunk.

Next file to read: v4jax/convert/conversion.py.
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
from v4jax.checkpoint.bucket_clients import kvstore
from v4jax.checkpoint.checksums import write_sums
from v4jax.checkpoint.names import Path, leaf_dtypes, official_names, turned
from v4jax.checkpoint.store import CHECKPOINTS, Store
from v4jax.checkpoint.store_params import check_same_arrays
from v4jax.config import ModelConfig
from v4jax.parameter_tree import abstract_params
from v4jax.storage import Place, Remote

_CHUNK_BYTES = 64 * 2**20
_WAIT_BYTES = 128 * 2**20
"""Bytes written between two waits for the disk."""
_PUTTING = 4
"""Files that wait for the disk at once: a file system syncs several in one journal commit."""
_READ = {"cache_pool": {"total_bytes_limit": 256 * 2**20}, "file_io_mode": {"mode": "direct"}}
"""Several experts of a layer may share a chunk; the cache lets it be decoded once for all of them.
Files are read past the page cache (see disk.py)."""


def open_leaves(directory, cfg: ModelConfig) -> dict[Path, Any]:
    """Parameter path -> its array on disk, of a store's newest checkpoint.

    leaf[index] reads only what it needs.

    Raises:
      ValueError: no complete checkpoint, or one of another model (names the first array that
        differs).
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

    A thread waits for the disk meanwhile. Leaving the context waits for that thread.
    """

    def __init__(self, directory: Place, cfg: ModelConfig, dtype: np.dtype, compress: bool = True):
        """Makes the store, or opens an unfinished one with what it has.

        Args:
          dtype: of every *.weight.
          compress: compress the chunks, which pays only for numbers that came from low precision.
        """
        slots = official_names(cfg)
        dtypes = leaf_dtypes(cfg, dtype)
        stacked = {slot.path: len(slot.index) for slot in slots.values()}
        leaves: dict[Path, Any] = flatten_dict(abstract_params(cfg))
        shapes = {path: leaf.shape for path, leaf in leaves.items()}
        self._path = path = directory / CHECKPOINTS / "0"
        if not path.exists():
            # This writes Orbax's own files. Full arrays replace these arrays below.
            with Store(directory, writes=True) as store:
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
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._putting: concurrent.futures.Future | None = None
        # No sync after each matrix: `_put` syncs many at once.
        context = ts.Context({"file_io_sync": False})
        for where, shape in shapes.items():
            found = ts.open(_spec(path, where)).result()
            # The placeholder that Orbax wrote has no crc32c codec.
            assert found.codec is not None, "an array of zarr has codecs"
            begun = found.shape == shape and found.codec.to_json()["codecs"][-1]["name"] == "crc32c"
            fresh = {} if begun else create(shape, dtypes[where], stacked[where], compress)
            self._leaves[where] = ts.open(_spec(path, where) | fresh, context=context).result()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *error) -> None:
        self._thread.shutdown()

    def write(self, tensors: Iterable[tuple[str, np.ndarray]]) -> dict[str, str]:
        """Writes official tensors to their places and reads them back.

        It is one commit if no tensor is larger than a chunk.

        Returns:
          Name -> checksum of the tensor as the store has it.

        Raises:
          OSError: the disk is full, or gives back other bytes.
        """
        sums, writing, size = {}, [], 0
        try:
            for name, array in tensors:
                held = self._start(name, array, writing)
                del array  # before the next one is read
                sums[name], size = _sum(held), size + held.nbytes
        finally:
            self._wait(writing)  # after a failure too: nothing may be written later
        for name, one in sums.items():
            if not self.holds(name, one):
                raise OSError(f"{self._path}: {name} reads back other than it was written")
        self._written(size)
        return sums

    def _start(self, name: str, array: np.ndarray, writing: list[Any]) -> np.ndarray:
        """Starts writing a tensor, adds to `writing` what to wait for, returns it as stored."""
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
            if len(held) > rows:  # one at a time: each is copied and compressed in memory
                self._wait(writing)
        return held

    def _wait(self, writing: list[Any]) -> None:
        try:
            while writing:
                writing.pop().result()
        except ValueError as error:  # TensorStore's error for a full disk, too
            raise OSError(f"{self._path} could not be written: {error}") from error

    def _written(self, size: int) -> None:
        if isinstance(self._path, Remote):  # its store has it when the write returns
            return
        with self._lock:
            self._waiting += size
            if self._waiting >= _WAIT_BYTES:
                self._waiting = 0
                self._begin_put()

    def _begin_put(self) -> concurrent.futures.Future:
        if self._putting is not None:  # all workers wait: none may write faster than the disk
            self._putting.result()
        self._putting = self._thread.submit(self._put)
        return self._putting

    def _put(self) -> None:
        """Syncs what was written so far, and keeps its checksums."""
        assert not isinstance(self._path, Remote)
        new = [path for path in _data_files(self._path) if path not in self._sums]
        with concurrent.futures.ThreadPoolExecutor(_PUTTING) as pool:
            self._sums.update(zip(new, pool.map(disk.put, new), strict=True))

    def finish(self) -> None:
        """Syncs all files and writes their checksums. Call it when everything is written."""
        if isinstance(self._path, Remote):
            write_sums(self._path)
            return
        self._begin_put().result()
        for path in self._path.rglob("*"):
            if path.is_file() and path not in self._sums:
                with open(path) as file:
                    os.fsync(file.fileno())
        write_sums(self._path, known=self._sums)

    def holds(self, name: str, checksum: str) -> bool:
        """Whether an official tensor reads back with the checksum that `write` returned."""
        slot = self._slots[name]
        try:
            return _sum(self._leaves[slot.path][slot.index].read().result()) == checksum
        except ValueError:  # TensorStore's error for a damaged file
            return False


def _sum(array: np.ndarray) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data):08x}"


def _data_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files of an OCDBT database that hold its values. Each is written once, under a new name.

    A name that ends in .__lock is of a file that is still being written.
    """
    return [file for file in (path / "params" / "d").iterdir() if not file.name.endswith(".__lock")]


def _spec(path: Place, where: Path) -> dict[str, Any]:
    base = kvstore(path / "params")
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": base, "path": ".".join(where) + "/"},
        # Chunks of zeros too: Orbax takes a chunk that is not there for a lost one.
        "store_data_equal_to_fill_value": True,
    }


def create(shape: tuple[int, ...], dtype: np.dtype, stacked: int, compress: bool) -> dict[str, Any]:
    """TensorStore's metadata of a new array. A chunk is one matrix, or a part of one.

    stacked: number of leading axes that stack matrices.
    """
    matrix = list(shape[stacked:])
    if len(matrix) > 1:
        matrix[0] = min(matrix[0], max(1, _CHUNK_BYTES // (dtype.itemsize * matrix[1])))
    chunk = [1] * stacked + matrix
    # Numbers from low precision differ in few bits: sorted by bit, lz4 finds nearly what zstd
    # finds, and much faster.
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
