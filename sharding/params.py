"""Where each weight lives: abstract variables and their logical axes -> NamedSharding, checked before anything is built.

Next file to read: v4jax/train/step.py.
"""

import math

import jax
from jax.sharding import Mesh, NamedSharding

from sharding.rules import AxisRules


def named_shardings(mesh: Mesh, rules: AxisRules, abstract, axes):
    """Tree of NamedSharding for the tree `abstract`; `axes` has a tuple of logical axis names at each leaf.

    Raises:
      ValueError: a dimension that does not divide by its mesh axes, naming the tensor, the axis and the sizes.
    """

    def place(path, leaf, names):
        tensor = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = rules.spec(names)
        for size, name in zip(leaf.shape, names, strict=True):
            parts = math.prod(mesh.shape[axis] for axis in rules.mesh_axes(name))
            if size % parts:
                where = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in rules.mesh_axes(name))
                raise ValueError(
                    f"{tensor} {leaf.shape}: axis {name!r} of size {size} does not divide by {where}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, abstract, axes)


def bytes_per_device(abstract, shardings) -> int:
    """Bytes one device holds of a tree of arrays placed by a tree of NamedSharding."""
    leaves = zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True)
    return sum(
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in leaves
    )
