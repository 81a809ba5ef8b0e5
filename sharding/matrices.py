"""Work on whole matrices of a tensor that is cut over a mesh, spread over the devices instead of repeated on each.

A tensor [..., A, Z] is a stack of matrices. Where the devices along a mesh axis hold pieces of them, an all-to-all gives each
device some matrices whole and takes them back afterwards: every byte moves once there and once back. Where the devices hold
copies, each works on its share and the results are gathered. A stack with fewer matrices than an axis has devices is gathered
along it, and its work repeated there.

Next file to read: v4jax/train/muon.py.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec


def on_whole_matrices(f: Callable[[jax.Array], jax.Array], x: jax.Array, spec: PartitionSpec | None) -> jax.Array:
    """f(x) for a function of stacks [N, A, Z] that treats every matrix by itself; x [..., A, Z] lies as `spec` says.

    `spec` None: x is whole, nothing moves. Otherwise needs an ambient mesh. Not differentiable.
    """
    if spec is None:
        return f(x.reshape(-1, *x.shape[-2:])).reshape(x.shape)
    sizes = {axis: size for axis, size in jax.sharding.get_abstract_mesh().shape.items() if size > 1}
    parts = [part if isinstance(part, tuple) else (part,) for part in spec] + [()] * (x.ndim - len(spec))
    cut = [tuple(axis for axis in part if axis in sizes) for part in parts]
    copies = tuple(axis for axis in sizes if not any(axis in part for part in cut))
    local = functools.partial(_local, f, sizes, cut[-2], cut[-1], copies)
    # Results of copies are gathered to equal values, which the type system of shard_map cannot see.
    return jax.shard_map(local, in_specs=spec, out_specs=spec, check_vma=False)(x)


def _local(f, sizes: dict[str, int], rows: tuple[str, ...], columns: tuple[str, ...], copies: tuple[str, ...], x: jax.Array):
    stack = x.reshape(-1, *x.shape[-2:])
    undo = []
    for axis in copies:
        if len(stack) >= sizes[axis]:
            stack, back = _share(stack, axis, sizes[axis])
            undo.append(back)
    for dim, axes in ((1, rows), (2, columns)):
        for axis in reversed(axes):  # the innermost axis has neighbouring pieces
            stack, back = _collect(stack, axis, sizes[axis], dim)
            undo.append(back)
    stack = f(stack)
    for back in reversed(undo):
        stack = back(stack)
    return stack.reshape(x.shape)


def _share(stack, axis: str, size: int):
    """This device's share of matrices that all devices along `axis` hold, and how to gather the results."""
    count = len(stack)
    stack = _fill_up(stack, size)
    each = len(stack) // size
    mine = lax.dynamic_slice_in_dim(stack, lax.axis_index(axis) * each, each)
    return mine, lambda out: lax.all_gather(out, axis, axis=0, tiled=True)[:count]


def _collect(stack, axis: str, size: int, dim: int):
    """Matrices whole along `dim`, of which devices along `axis` hold pieces, and how to give the pieces back."""
    count, width = len(stack), stack.shape[dim]
    if count < size:
        whole = lax.all_gather(stack, axis, axis=dim, tiled=True)
        return whole, lambda out: lax.dynamic_slice_in_dim(out, lax.axis_index(axis) * width, width, axis=dim)
    whole = lax.all_to_all(_fill_up(stack, size), axis, split_axis=0, concat_axis=dim, tiled=True)
    return whole, lambda out: lax.all_to_all(out, axis, split_axis=dim, concat_axis=0, tiled=True)[:count]


def _fill_up(stack, multiple: int):
    """`stack` with matrices of zeros behind it, up to a multiple."""
    missing = math.ceil(len(stack) / multiple) * multiple - len(stack)
    return jnp.pad(stack, ((0, missing), (0, 0), (0, 0)))
