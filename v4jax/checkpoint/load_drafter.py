"""Reads a checkpoint's DSpark drafter into v4jax's tree, one tensor at a time.

Next file to read: v4jax/model/dspark.py.
"""

from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from sharding.params import named_shardings
from sharding.rules import AxisRules
from v4jax.checkpoint.carried import DRAFTER, part_of, stored_as_is
from v4jax.checkpoint.files import Header
from v4jax.checkpoint.formats import Kind, decode
from v4jax.checkpoint.load import carried_of
from v4jax.checkpoint.names import Path, held_in, plain_dtype
from v4jax.config import ModelConfig
from v4jax.config.json_styles import read_config_json
from v4jax.config.releases import DSparkConfig, read_dspark
from v4jax.drafter_parameters import DraftTensor, drafter_tensors
from v4jax.storage import checkpoint_path


def drafter_config(directory) -> DSparkConfig | None:
    """The DSpark drafter that a checkpoint's config.json describes; its tensors may be missing."""
    return read_dspark(read_config_json(checkpoint_path(directory, "path") / "config.json"))


def check_drafter(directory) -> None:
    """Reads the headers of a drafter that config.json describes.

    Raises:
      ValueError: there are no mtp.* tensors of it, or they do not fit.
    """
    _tensors(directory)


def load_drafter(
    directory, cfg: ModelConfig, dspark: DSparkConfig, dtype: str, mesh: Mesh, rules: AxisRules
) -> dict[str, Any]:
    """The drafter's parameters, each array on the devices of its sharding.

    Every process reads every tensor; one array and one tensor are in memory at a time.

    Args:
      dtype: "float32" or "bfloat16", of every *.weight (names.held_in).

    Raises:
      ValueError: no mtp.* tensors; or naming the tensor: numbers that are not finite.
    """
    plain = plain_dtype(dtype)
    carried = _tensors(directory)
    of_leaf: dict[Path, list[tuple[str, DraftTensor]]] = {}
    for name, tensor in drafter_tensors(cfg, dspark).items():
        of_leaf.setdefault(tensor.path, []).append((name, tensor))
    shapes = {path: _leaf_shape(tensors) for path, tensors in of_leaf.items()}
    abstract = {path: jax.ShapeDtypeStruct(shape, plain) for path, shape in shapes.items()}
    axes = {path: tensors[0][1].axes for path, tensors in of_leaf.items()}
    trees = unflatten_dict(abstract), unflatten_dict(axes)
    places: dict[Path, Any] = flatten_dict(named_shardings(mesh, rules, *trees))
    arrays = {}
    for path, tensors in of_leaf.items():
        array = np.empty(shapes[path], held_in(tensors[0][1].precision, plain))
        for name, tensor in tensors:
            numbers = _numbers(directory, carried, name)
            array[tensor.index] = numbers.T if tensor.transpose else numbers
        arrays[path] = jax.make_array_from_callback(array.shape, places[path], array.__getitem__)
    return unflatten_dict(arrays)


def _tensors(directory) -> dict[str, Header]:
    """Name -> place of the drafter's tensors."""
    carried = {name: one for name, one in carried_of(directory).items() if part_of(name) == DRAFTER}
    if not carried:
        raise ValueError(f"{directory}: has no mtp.* tensors of its DSpark drafter")
    return carried


def _leaf_shape(tensors: list[tuple[str, DraftTensor]]) -> tuple[int, ...]:
    """The shape of an array of the tree; one of experts stacks a tensor of each."""
    tensor = tensors[0][1]
    shape = tensor.shape[::-1] if tensor.transpose else tensor.shape
    return (len(tensors), *shape) if tensor.index else shape


def _numbers(directory, carried: dict[str, Header], name: str) -> np.ndarray:
    stored, scale = stored_as_is(carried, name), carried.get(f"{name.removesuffix('weight')}scale")
    kind = Kind(carried[name].dtype, None if scale is None else scale.dtype)
    try:
        numbers = decode(kind, stored)
    except ValueError as error:
        raise ValueError(f"{directory}: {name}: {error}") from None
    if not np.isfinite(numbers).all():
        raise ValueError(f"{directory}: {name}: got numbers that are not finite")
    return numbers
