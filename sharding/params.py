"""Places every weight on a mesh: logical axes become a NamedSharding, checked before it is used.

Next file to read: v4jax/train/step.py.
"""

import math

import jax
from jax.sharding import Mesh, NamedSharding

from sharding.rules import AxisRules


def named_shardings(mesh: Mesh, rules: AxisRules, abstract, axes):
    """A NamedSharding for every leaf of `abstract`.

    Args:
      abstract: a tree of arrays, or of their shapes.
      axes: the same tree with a tuple of logical axis names at each leaf, one per dimension.

    Raises:
      ValueError: a dimension does not divide by its mesh axes; names the tensor, axis and sizes.
    """

    def place(path, leaf, names):
        tensor = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = rules.spec(names)
        for size, name in zip(leaf.shape, names, strict=True):
            parts = math.prod(mesh.shape[axis] for axis in rules.mesh_axes(name))
            if size % parts:
                where = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in rules.mesh_axes(name))
                raise ValueError(
                    f"{tensor} {leaf.shape}: axis {name!r} of size {size} "
                    f"does not divide by {where}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, abstract, axes)


def bytes_per_device(abstract, shardings) -> int:
    """Bytes that one device holds of the tree `abstract`, placed by the tree `shardings`."""
    leaves = zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True)
    return sum(
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in leaves
    )
