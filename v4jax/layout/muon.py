"""Muon on paper: the stacks of whole matrices one device orthogonalises, and what it sends for them.

Follows sharding/matrices.py step by step: pieces become whole matrices, each device works on its share, and stacks with too few
matrices for an axis are joined with others of their shape before they are shared out.

Next file to read: v4jax/layout/work.py.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sharding.matrices import TOGETHER
from sharding.rules import AxisRules
from v4jax.config import ModelConfig
from v4jax.layout.weights import Weight, cut_of, weights_of


class Stack(NamedTuple):
    """`count` whole float32 matrices of `shape` that one device works on; all devices along `alike` hold the same ones."""

    shape: tuple[int, int]
    count: int
    alike: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return 4 * self.count * math.prod(self.shape)


class Muon(NamedTuple):
    """stacks: those of one device, each one call of Newton-Schulz. sent: (mesh axis, collective, bytes) of one device."""

    stacks: tuple[Stack, ...]
    sent: tuple[tuple[str, str, float], ...]


def muon(model: ModelConfig, rules: AxisRules, sizes: Mapping[str, int]) -> Muon:
    """What Muon does with the matrices of `model`."""
    return _muon(model, rules, tuple(sizes.items()))


@functools.lru_cache(64)
def _muon(model: ModelConfig, rules: AxisRules, items: tuple[tuple[str, int], ...]) -> Muon:
    sizes, sent, stacks, shares = dict(items), [], [], []
    for weight in weights_of(model):
        if weight.optimizer == "muon":
            stack, moved = _whole(weight, cut_of(weight, rules, sizes).parts, sizes)
            stacks.append(stack)
            sent += moved
    for stack in _joined(stacks):
        share, moved = _share_out(stack, sizes)
        shares.append(share)
        sent += moved
    return Muon(tuple(_joined(shares)), tuple(sent))


def _whole(weight: Weight, parts, sizes: Mapping[str, int]) -> tuple[Stack, list[tuple[str, str, float]]]:
    """This device's share of one weight's matrices, whole; and what is sent for it, there and back."""
    sent, alike = [], []
    cut = math.prod(sizes[axis] for part in parts[-2:] for axis in part)
    piece = matrix = 4 * math.prod(weight.shape[-2:]) / cut
    count = weight.size // math.prod(weight.shape[-2:]) // math.prod(sizes[axis] for part in parts[:-2] for axis in part)
    used = [axis for part in parts for axis in part]
    for axis in (axis for axis, size in sizes.items() if size > 1 and axis not in used):
        if count >= sizes[axis]:  # the results are gathered when they are pieces again
            count = -(-count // sizes[axis])
            sent.append((axis, "all-gather", piece * count * (sizes[axis] - 1)))
        else:
            alike.append(axis)
    for axis in (axis for part in parts[-2:] for axis in reversed(part)):
        size = sizes[axis]
        if count < size:
            sent.append((axis, "all-gather", matrix * count * (size - 1)))
            alike.append(axis)
        else:
            count = -(-count // size)
            sent.append((axis, "all-to-all", 2 * matrix * count * (size - 1)))
        matrix *= size
    return Stack(weight.shape[-2:], count, tuple(alike)), sent


def _share_out(stack: Stack, sizes: Mapping[str, int]) -> tuple[Stack, list[tuple[str, str, float]]]:
    """The share of one device of matrices that several hold alike, as far as there are enough; the results are gathered."""
    sent, count = [], stack.count
    for axis in stack.alike:
        if count >= sizes[axis]:
            count = -(-count // sizes[axis])
            sent.append((axis, "all-gather", 4 * math.prod(stack.shape) * count * (sizes[axis] - 1)))
    return Stack(stack.shape, count), sent


def _joined(stacks: Iterable[Stack]) -> list[Stack]:
    """Stacks of one shape, alike along the same axes, as one, up to TOGETHER bytes."""
    groups: dict[tuple, list[Stack]] = {}
    for stack in stacks:
        group = groups.setdefault((stack.shape, stack.alike), [])
        if group and group[-1].bytes + stack.bytes <= TOGETHER:
            group[-1] = group[-1]._replace(count=group[-1].count + stack.count)
        else:
            group.append(stack)
    return [stack for group in groups.values() for stack in group]
