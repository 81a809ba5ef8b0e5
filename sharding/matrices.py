"""Work on the whole matrices of tensors that a mesh cuts, spread over devices and not repeated.

A tensor [..., A, Z] is a stack of matrices; stacks of one shape that lie alike are joined.

- Where the devices along a mesh axis hold pieces of matrices, an all-to-all gives each device some
  of them whole, and another takes the results back. So every byte moves once each way. Where there
  are fewer matrices than devices, some devices get none.
- Where the devices hold copies, each works on its share, and the results are gathered.
- A single matrix is gathered along an axis that cuts it.

Whole matrices that several devices still have in common are joined once more and shared out as
copies are. If they are fewer than the devices, every device works on all of them.

Shapes: M matrices of a stack, A rows, Z columns.

Next file to read: v4jax/train/newton_schulz.py.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

TOGETHER = 2**29
"""Bytes of stacks of one shape that are joined.

Each call of f is a program of its own, which takes seconds to compile; joined stacks are held
twice.
"""


def on_whole_matrices(
    f: Callable[[jax.Array], jax.Array],
    arrays: Sequence[jax.Array],
    specs: Sequence[PartitionSpec] | None,
) -> list[jax.Array]:
    """f(x) for each array [..., A, Z], where f treats every matrix by itself. Not differentiable.

    Args:
      f: stack [M, A, Z] -> stack of the same shape.
      arrays: stacks, of any shape with two or more axes.
      specs: how each array lies on the ambient mesh. None: all are whole, and nothing moves.
    """
    if specs is None or not arrays:
        outs = _together(f, [x.reshape(-1, *x.shape[-2:]) for x in arrays])
        return [out.reshape(x.shape) for out, x in zip(outs, arrays, strict=True)]
    # Gathered results are equal on all devices, which the type system of shard_map cannot see.
    local = functools.partial(_local, f, specs)
    return jax.shard_map(local, in_specs=(list(specs),), out_specs=list(specs), check_vma=False)(
        list(arrays)
    )


class _Way(NamedTuple):
    """How the matrices of a tensor lie.

    Attributes:
      rows, columns: mesh axes that cut rows, and those that cut columns.
      copies: mesh axes along which devices hold copies.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    copies: tuple[str, ...]


def _local(f, specs, arrays: list[jax.Array]) -> list[jax.Array]:
    pieces, ways = (
        [x.reshape(-1, *x.shape[-2:]) for x in arrays],
        [_way(x, spec) for x, spec in zip(arrays, specs, strict=True)],
    )
    joined = _groups(pieces, ways)
    stacks, undo, alike = zip(
        *(_whole(_join(pieces, group), ways[group[0]]) for group in joined), strict=True
    )
    groups = _groups(stacks, alike)
    shares, gather = zip(
        *(_share_out(_join(stacks, group), alike[group[0]]) for group in groups), strict=True
    )
    outs = [back(out) for back, out in zip(gather, _together(f, shares), strict=True)]
    outs = [back(out) for back, out in zip(undo, _part(outs, stacks, groups), strict=True)]
    return [
        out.reshape(x.shape) for out, x in zip(_part(outs, pieces, joined), arrays, strict=True)
    ]


def _together(f, stacks: Sequence[jax.Array]) -> list[jax.Array]:
    """f of each stack; small stacks of one shape are joined."""
    groups = _groups(stacks, [()] * len(stacks))
    return _part([f(_join(stacks, group)) for group in groups], stacks, groups)


def _groups(stacks: Sequence[jax.Array], alike: Sequence[tuple]) -> list[list[int]]:
    """The stacks to join, by number: of one shape, with equal `alike`, up to TOGETHER bytes."""
    groups: dict[tuple, list[list[int]]] = {}
    for i, stack in enumerate(stacks):
        parts = groups.setdefault((stack.shape[1:], alike[i]), [[]])
        if parts[-1] and stack.nbytes + sum(stacks[j].nbytes for j in parts[-1]) > TOGETHER:
            parts.append([])
        parts[-1].append(i)
    return list(itertools.chain(*groups.values()))


def _join(stacks: Sequence[jax.Array], group: list[int]) -> jax.Array:
    return jnp.concatenate([stacks[i] for i in group])


def _part(
    joined: Sequence[jax.Array], stacks: Sequence[jax.Array], groups: list[list[int]]
) -> list[jax.Array]:
    """Takes the results of joined groups apart, one for each stack."""
    outs = {}
    for out, group in zip(joined, groups, strict=True):
        start = 0
        for i in group:
            outs[i] = out[start : start + len(stacks[i])]
            start += len(stacks[i])
    return [outs[i] for i in range(len(stacks))]


def _way(x: jax.Array, spec: PartitionSpec) -> _Way:
    """How `x` lies, from its `spec` and the ambient mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    parts = [part if isinstance(part, tuple) else (part,) for part in spec] + [()] * (
        x.ndim - len(spec)
    )
    cut = [tuple(axis for axis in part if axis and sizes[axis] > 1) for part in parts]
    copies = tuple(
        axis for axis, size in sizes.items() if size > 1 and not any(axis in part for part in cut)
    )
    return _Way(cut[-2], cut[-1], copies)


def _whole(stack: jax.Array, way: _Way):
    """This device's share of the matrices, whole.

    Returns:
      (stack, the function that gives results back, axes along which devices hold the same stack).
    """
    undo, alike = [], []
    for axis in way.copies:
        if len(stack) >= lax.axis_size(axis):
            stack, back = _share(stack, axis, lax.axis_size(axis))
            undo.append(back)
        else:
            alike.append(axis)
    for dim, axes in ((1, way.rows), (2, way.columns)):
        for axis in reversed(axes):  # the innermost axis has neighbouring pieces
            if len(stack) == 1:
                alike.append(axis)
            stack, back = _collect(stack, axis, lax.axis_size(axis), dim)
            undo.append(back)
    return (
        stack,
        lambda out: functools.reduce(lambda out, back: back(out), reversed(undo), out),
        tuple(alike),
    )


def _share_out(stack: jax.Array, alike: tuple[str, ...]):
    """This device's share of matrices that devices along the axes `alike` have in common.

    An axis longer than the stack is skipped: its devices repeat the work.

    Returns:
      (stack, the function that gathers the results).
    """
    undo = []
    for axis in alike:
        size = lax.axis_size(axis)
        if len(stack) >= size:
            stack, back = _share(stack, axis, size)
            undo.append(back)
    return stack, lambda out: functools.reduce(lambda out, back: back(out), reversed(undo), out)


def _share(stack, axis: str, size: int):
    """This device's share of matrices that all devices along `axis` hold; how to gather results."""
    count = len(stack)
    stack = _fill_up(stack, size)
    each = len(stack) // size
    mine = lax.dynamic_slice_in_dim(stack, lax.axis_index(axis) * each, each)
    return mine, lambda out: lax.all_gather(out, axis, axis=0, tiled=True)[:count]


def _collect(stack, axis: str, size: int, dim: int):
    """Matrices whole along `dim`, from pieces along `axis`; how to give the pieces back."""
    count, width = len(stack), stack.shape[dim]
    if count == 1:
        whole = lax.all_gather(stack, axis, axis=dim, tiled=True)
        return whole, lambda out: lax.dynamic_slice_in_dim(
            out, lax.axis_index(axis) * width, width, axis=dim
        )
    whole = lax.all_to_all(_fill_up(stack, size), axis, split_axis=0, concat_axis=dim, tiled=True)
    return whole, lambda out: lax.all_to_all(out, axis, split_axis=dim, concat_axis=0, tiled=True)[
        :count
    ]


def _fill_up(stack, multiple: int):
    """`stack` with matrices of zeros added, up to a multiple of `multiple`."""
    missing = math.ceil(len(stack) / multiple) * multiple - len(stack)
    return jnp.pad(stack, ((0, missing), (0, 0), (0, 0)))
