"""The parameter tree with its low-precision matrices packed: shapes, axes, places on a mesh.

Next file to read: v4jax/quant/packed.py.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from sharding.params import named_shardings
from sharding.rules import AxisRules
from v4jax.config import ModelConfig
from v4jax.parameter_tree import Leaf, Path, leaves
from v4jax.quant import fp8, mxfp4
from v4jax.quant.packed import Packed

Formats = Mapping[Path, str]
"""Path of each array that is packed -> "fp8" or "mxfp4"."""


def released_formats(cfg: ModelConfig) -> Formats:
    """Which arrays instruct releases store in low precision, and how."""
    return {path: leaf.spec.precision for path, leaf in leaves(cfg).items() if leaf.spec.is_low}


def abstract_packed(cfg: ModelConfig, formats: Formats) -> dict[str, Any]:
    """Shapes and dtypes of the parameters (jax.ShapeDtypeStruct): what is not packed is bfloat16.

    What official files keep in float32 or int64 stays float32, as everywhere.
    """
    return unflatten_dict(
        {path: _abstract(leaf, formats.get(path)) for path, leaf in leaves(cfg).items()}
    )


def packed_axes(cfg: ModelConfig, formats: Formats) -> dict[str, Any]:
    """Logical axes of the parameters: codes and scales have those of their matrix."""
    return unflatten_dict(
        {
            path: Packed(leaf.axes, leaf.axes, formats[path]) if path in formats else leaf.axes
            for path, leaf in leaves(cfg).items()
        }
    )


def packed_shardings(
    mesh: Mesh, rules: AxisRules, cfg: ModelConfig, formats: Formats
) -> dict[str, Any]:
    """NamedSharding of every array of the packed tree.

    Raises:
      ValueError: a layout that would cut a block of numbers that share a scale, or an axis that
        does not divide; names the array, the axis and the sizes.
    """
    for path, leaf in leaves(cfg).items():
        if path in formats:
            _check_cuts(mesh, rules, "/".join(path), leaf, formats[path])
    return named_shardings(mesh, rules, abstract_packed(cfg, formats), packed_axes(cfg, formats))


def _abstract(leaf: Leaf, format: str | None) -> Any:
    if format is None:
        exact = leaf.spec.precision in ("float32", "int64")
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if exact else jnp.bfloat16)
    *lead, rows, width = leaf.shape
    if format == "mxfp4":
        codes, scale = (*lead, rows // 2, width), (*lead, rows // mxfp4.BLOCK, width)
        of_scale: Any = jnp.uint8
    else:
        codes, of_scale = leaf.shape, jnp.float32
        scale = (*lead, *(-(-size // fp8.BLOCK) for size in (rows, width)))
    return Packed(
        jax.ShapeDtypeStruct(codes, jnp.uint8), jax.ShapeDtypeStruct(scale, of_scale), format
    )


def _check_cuts(mesh: Mesh, rules: AxisRules, name: str, leaf: Leaf, format: str) -> None:
    for size, axis, block in _blocks(leaf, format):
        cuts = {cut: mesh.shape[cut] for cut in rules.mesh_axes(axis) if mesh.shape[cut] > 1}
        parts = math.prod(cuts.values())
        if parts > 1 and size % (parts * block):
            over = " x ".join(f"{cut}={count}" for cut, count in cuts.items())
            raise ValueError(
                f"{name} {leaf.shape}: axis {axis!r} of size {size} over {over} would cut a block "
                f"of {block} numbers that share a scale ({format}); packed weights need a multiple "
                f"of {block} on each device"
            )


def _blocks(leaf: Leaf, format: str) -> Iterator[tuple[int, str | None, int]]:
    """(size, logical axis, numbers along it that share a scale) of a matrix's two axes."""
    along = (mxfp4.BLOCK, 1) if format == "mxfp4" else (fp8.BLOCK, fp8.BLOCK)
    yield from zip(leaf.shape[-2:], leaf.axes[-2:], along, strict=True)
