"""Reads safetensors onto a mesh: each process only what its devices hold, a piece at a time.

A leaf stacks many official tensors, and a device holds a block of it. A tensor outside of the block
is not read; of one inside, only the rows that the block needs (of fp8 the rows of whole blocks of
scales). Where the mesh cuts the columns of a matrix, its rows are read whole.

Example: w1 of 256 experts, cut into expert=8. A process with devices 0 and 1 reads the tensors of
experts 0 to 63, and no byte of the others.

Next file to read: v4jax/checkpoint/packed_parts.py.
"""

import concurrent.futures
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from v4jax.checkpoint import packed_parts
from v4jax.checkpoint.files import read_rows
from v4jax.checkpoint.formats import Kind, Stored, decode
from v4jax.checkpoint.load import Source
from v4jax.checkpoint.names import Path, Slot, held_in, official_names, plain_dtype
from v4jax.checkpoint.pieces import Block, place_in_pieces
from v4jax.packed_tree import abstract_packed
from v4jax.parameter_tree import leaves, spec_named
from v4jax.quant import fp8
from v4jax.quant.packed import Packed

READERS = 16
"""Tensors read at once."""


def load_shards(source: Source, dtype: str, places: Any) -> dict[str, Any]:
    """The parameters of a checkpoint, each array on the devices of its sharding.

    Hash tables come first: they are small, and their values can be wrong.

    Args:
      dtype: "float32" or "bfloat16", of every *.weight (names.held_in); or "packed": what files
        hold in low precision stays as it is, and the rest is as for bfloat16.
      places: tree of shardings, shaped like the parameters; for "packed" that of packed_shardings.

    Raises:
      ValueError: naming the tensor: numbers that are not finite, ids of no expert.
      OSError: a bucket is out of reach, or a file is shorter than it was.
    """
    shardings: dict[Path, Any] = flatten_dict(places)
    formats = packed_parts.formats_of(source) if dtype == "packed" else {}
    abstract: dict[Path, Any] = flatten_dict(abstract_packed(source.cfg, formats))
    plain = plain_dtype("bfloat16" if dtype == "packed" else dtype)
    of_leaf: dict[Path, list[tuple[str, Slot]]] = {path: [] for path in shardings}
    for name, slot in official_names(source.cfg).items():
        of_leaf[slot.path].append((name, slot))
    declared = leaves(source.cfg)
    tables_first = sorted(declared, key=lambda path: declared[path].spec.precision != "int64")
    arrays: dict[Path, Any] = {}
    with concurrent.futures.ThreadPoolExecutor(READERS, "v4jax-tensors") as pool:

        def placed(path: Path, of: Any, dtype: np.dtype, sharding: Any, numbers: Read) -> jax.Array:
            part = _Part(source, dtype, of_leaf[path], pool, numbers)
            return place_in_pieces(of.shape, dtype, sharding, part.read)

        for path in tables_first:
            of, place = abstract[path], shardings[path]
            if isinstance(of, Packed):
                codes, scale = packed_parts.READS[of.format]
                arrays[path] = Packed(
                    placed(path, of.codes, of.codes.dtype, place.codes, codes),
                    placed(path, of.scale, of.scale.dtype, place.scale, scale),
                    of.format,
                )
                continue
            held = held_in(declared[path].spec.precision, plain)
            arrays[path] = placed(path, of, held, place, _numbers)
    return unflatten_dict({path: arrays[path] for path in declared})


Read = Callable[[Source, str, Slot, Block], np.ndarray]
"""(checkpoint, name of a tensor, its slot, block of its matrix in the tree) -> that block."""


class _Part(NamedTuple):
    """An array on devices, and the official tensors that it consists of."""

    source: Source
    dtype: np.dtype
    slots: list[tuple[str, Slot]]
    pool: concurrent.futures.Executor
    numbers: Read

    def read(self, block: Block) -> np.ndarray:
        """A block of the array."""
        array = np.empty([len(part) for part in block], self.dtype)

        def fill(name: str, slot: Slot) -> None:
            lead = len(slot.index)
            at = tuple(i - part.start for i, part in zip(slot.index, block[:lead], strict=True))
            array[at] = self.numbers(self.source, name, slot, block[lead:])

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
