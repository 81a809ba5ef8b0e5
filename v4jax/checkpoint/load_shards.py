"""Reads safetensors of a bucket or the Hub onto a mesh: each process only what its devices hold.

A leaf stacks many official tensors, and a device holds a block of it. A tensor outside of the block
is not read; of one inside, only the rows that the block needs (of fp8 the rows of whole blocks of
scales). Where the mesh cuts the columns of a matrix, its rows are read whole.

Example: w1 of 256 experts, cut into expert=8. A process with devices 0 and 1 reads the tensors of
experts 0 to 63, and no byte of the others.

Next file to read: v4jax/checkpoint/export.py.
"""

import concurrent.futures
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from v4jax.checkpoint.files import read_rows
from v4jax.checkpoint.formats import Kind, Stored, decode
from v4jax.checkpoint.load import Source
from v4jax.checkpoint.names import Path, Slot, leaf_dtypes, official_names
from v4jax.parameter_tree import leaves, spec_named
from v4jax.quant import fp8

READERS = 16
"""Tensors read at once."""
Block = tuple[range, ...]
"""The part of a leaf that a device holds: along each axis, which indices."""


def load_shards(source: Source, dtype: str, places: Any) -> dict[str, Any]:
    """The parameters of a checkpoint, each array on the devices of its sharding.

    Args:
      dtype: "float32" or "bfloat16", of every *.weight (names.held_in).
      places: tree of shardings, shaped like the parameters.

    Raises:
      ValueError: naming the tensor: numbers that are not finite, ids of no expert.
      OSError: the bucket is out of reach, or a file is shorter than it was.
    """
    shardings: dict[Path, Any] = flatten_dict(places)
    dtypes = leaf_dtypes(source.cfg, dtype)
    of_leaf: dict[Path, list[tuple[str, Slot]]] = {path: [] for path in shardings}
    for name, slot in official_names(source.cfg).items():
        of_leaf[slot.path].append((name, slot))
    arrays = {}
    with concurrent.futures.ThreadPoolExecutor(READERS, "v4jax-tensors") as pool:
        for path, leaf in leaves(source.cfg).items():
            reader = _Leaf(source, leaf.shape, dtypes[path], of_leaf[path], pool)
            arrays[path] = jax.make_array_from_callback(leaf.shape, shardings[path], reader.block())
    return unflatten_dict(arrays)


class _Leaf(NamedTuple):
    """One array of the tree, and the official tensors that it consists of."""

    source: Source
    shape: tuple[int, ...]
    dtype: np.dtype
    slots: list[tuple[str, Slot]]
    pool: concurrent.futures.Executor

    def block(self) -> Callable[[Any], np.ndarray]:
        """A function that reads the block of a device; equal blocks are read once."""
        found: dict[Block, np.ndarray] = {}

        def read(index: tuple[slice, ...]) -> np.ndarray:
            block = tuple(range(size)[cut] for size, cut in zip(self.shape, index, strict=True))
            if block not in found:
                found[block] = self._read(block)
            return found[block]

        return read

    def _read(self, block: Block) -> np.ndarray:
        array = np.empty([len(part) for part in block], self.dtype)

        def fill(name: str, slot: Slot) -> None:
            lead = len(slot.index)
            at = tuple(i - part.start for i, part in zip(slot.index, block[:lead], strict=True))
            array[at] = _numbers(self.source, name, slot, block[lead:])

        wanted = [
            (name, slot)
            for name, slot in self.slots
            if all(i in part for i, part in zip(slot.index, block, strict=False))
        ]
        for done in [self.pool.submit(fill, *one) for one in wanted]:
            done.result()
        return array


def _numbers(source: Source, name: str, slot: Slot, block: Block) -> np.ndarray:
    """The part `block` of an official tensor, oriented as in the tree."""
    header = source.headers[name]
    if spec_named(name).precision == "int64" or not header.shape:  # ids are checked as a whole
        return source.numbers(name)[tuple(slice(part.start, part.stop) for part in block)]
    rows, *columns = block[::-1] if slot.transpose else block
    first, last = _aligned(source.kinds[name], rows, header.shape[0])
    numbers = _decoded(source, name, first, last)
    cut = slice(rows.start - first, rows.stop - first)
    numbers = numbers[(cut, *(slice(part.start, part.stop) for part in columns))]
    return numbers.T if slot.transpose else numbers


def _aligned(kind: Kind, rows: range, count: int) -> tuple[int, int]:
    """The first row to read and the one after the last: fp8 has a scale for 128 rows.

    Example: rows 100 to 299 of 300 fp8 rows need rows 0 to 299; of bfloat16, only themselves.
    """
    if kind.dtype != "F8_E4M3":
        return rows.start, rows.stop
    return rows.start - rows.start % fp8.BLOCK, min(count, -(-rows.stop // fp8.BLOCK) * fp8.BLOCK)


def _decoded(source: Source, name: str, first: int, last: int) -> np.ndarray:
    """The numbers of rows `first` to `last`, which `_aligned` chose."""
    kind, scale = source.kinds[name], None
    if name in source.scales:
        per = fp8.BLOCK if kind.dtype == "F8_E4M3" else 1
        scale = read_rows(source.scales[name], first // per, -(-last // per))
    try:
        return decode(kind, Stored(read_rows(source.headers[name], first, last), scale))
    except ValueError as error:
        raise ValueError(f"{source.directory}: {name}: {error}") from None
