"""Reads what packed weights consist of from files: codes and scales, turned as the tree has them.

Next file to read: v4jax/packed_tree.py.
"""

import contextlib
from collections.abc import Callable, Iterator

import numpy as np

from v4jax.checkpoint.files import read_rows
from v4jax.checkpoint.formats import Kind, float_scale
from v4jax.checkpoint.load import Source
from v4jax.checkpoint.names import Path, Slot, official_names
from v4jax.checkpoint.pieces import Block
from v4jax.packed_tree import Formats
from v4jax.quant import fp8
from v4jax.quant.packed import bytes_by_halves, check_scales


def formats_of(source: Source) -> Formats:
    """Which arrays of the tree this checkpoint holds in low precision, and how.

    Raises:
      ValueError: tensors of one array in different formats; names two of them.
    """
    first: dict[Path, str] = {}
    for name, slot in official_names(source.cfg).items():
        other = first.setdefault(slot.path, name)
        here, there = _format(source.kinds[name]), _format(source.kinds[other])
        if here != there:
            raise ValueError(
                f"{source.directory}: {name} is stored as {here or 'plain numbers'}, {other} as "
                f"{there or 'plain numbers'}; packed weights need one format for both; load it as "
                "bfloat16"
            )
    formats = {path: _format(source.kinds[name]) for path, name in first.items()}
    return {path: format for path, format in formats.items() if format}


def _format(kind: Kind) -> str:
    """The format of a packed weight; "" for plain numbers."""
    if kind.scale is None:
        return ""
    return "mxfp4" if kind.dtype == "I8" else "fp8"


def _fp8_codes(source: Source, name: str, slot: Slot, block: Block) -> np.ndarray:
    columns, rows = block
    codes = read_rows(source.headers[name], rows.start, rows.stop)
    with _named(source, name):
        fp8.check_codes(codes)
    return codes.view(np.uint8)[:, columns.start : columns.stop].T


def _fp8_scale(source: Source, name: str, slot: Slot, block: Block) -> np.ndarray:
    columns, rows = block
    stored = read_rows(source.scales[name], rows.start, rows.stop)
    with _named(source, name):
        scale = float_scale(source.kinds[name], stored)
        if scale.size and scale.max() > np.finfo(np.float32).max / (2 * fp8.LARGEST):
            raise ValueError(f"scale: got {scale.max()}; too large for packed weights")
    return scale[:, columns.start : columns.stop].T


def _mxfp4_codes(source: Source, name: str, slot: Slot, block: Block) -> np.ndarray:
    columns, rows = block
    packed = read_rows(source.headers[name], rows.start, rows.stop)
    return bytes_by_halves(packed)[:, columns.start : columns.stop].T


def _mxfp4_scale(source: Source, name: str, slot: Slot, block: Block) -> np.ndarray:
    columns, rows = block
    scale = read_rows(source.scales[name], rows.start, rows.stop).view(np.uint8)
    with _named(source, name):
        float_scale(source.kinds[name], scale)
        check_scales(lambda: read_rows(source.headers[name], rows.start, rows.stop), scale)
    return scale[:, columns.start : columns.stop].T


@contextlib.contextmanager
def _named(source: Source, name: str) -> Iterator[None]:
    """Puts the checkpoint and the tensor before what a check says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source.directory}: {name}: {error}") from None


READS: dict[str, tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]] = {
    "fp8": (_fp8_codes, _fp8_scale),
    "mxfp4": (_mxfp4_codes, _mxfp4_scale),
}
"""Format -> how codes and scales of a tensor are read (Read in v4jax/checkpoint/load_shards.py)."""
