"""Estimates Muon: the stacks of matrices that one device orthogonalises, and what it sends.

It follows sharding/matrices.py step by step: stacks that lie alike are joined, pieces become whole
matrices, and each device works on its share.

Next file to read: v4jax/planner/recompute.py.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax.numpy as jnp

from sharding.matrices import TOGETHER
from sharding.rules import AxisRules
from v4jax.config import ModelConfig
from v4jax.planner.hardware import Hardware
from v4jax.planner.weights import Weight, cut_of, weights_of
from v4jax.train.config import TrainConfig


class Stack(NamedTuple):
    """`count` float32 matrices of `shape` on one device.

    Attributes:
      alike: what stacks must have in common to be joined. At first it says how the pieces lie; for
        whole matrices, along which axes all devices hold the same ones.
    """

    shape: tuple[int, int]
    count: int
    alike: tuple = ()

    @property
    def bytes(self) -> int:
        return 4 * self.count * math.prod(self.shape)


class Muon(NamedTuple):
    """What Muon does on one device.

    Attributes:
      stacks: each is one call of Newton-Schulz.
      sent: (mesh axis, collective, bytes).
    """

    stacks: tuple[Stack, ...]
    sent: tuple[tuple[str, str, float], ...]


def state_bytes(cfg: TrainConfig, optimizer: str) -> int:
    """Bytes of optimizer state per number of a weight: a momentum, or two moments."""
    if optimizer == "muon":
        return jnp.dtype(cfg.momentum_dtype).itemsize
    return 2 * jnp.dtype(cfg.moment_dtype).itemsize if optimizer == "adamw" else 0


def product_rate(cfg: TrainConfig, device: Hardware) -> float:
    """FLOPs per second of Newton-Schulz: float32 factors are rounded to TF32 on a GPU.

    JAX's default precision does so (docs.jax.dev/en/latest/201/precision.html); TPUs round to
    bfloat16.
    """
    if cfg.newton_schulz_dtype == "float32" and device.tf32_flops:
        return device.tf32_flops
    return device.bf16_flops


def muon(cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int]) -> Muon:
    """What Muon does with the matrices of the model; pairs of adapters are too small to count."""
    if cfg.lora is not None:
        return Muon((), ())
    return _muon(cfg.model, rules, tuple(sizes.items()))


@functools.lru_cache(64)
def _muon(model: ModelConfig, rules: AxisRules, items: tuple[tuple[str, int], ...]) -> Muon:
    sizes, sent, stacks, shares = dict(items), [], [], []
    pieces = [
        _pieces(weight, cut_of(weight, rules, sizes).parts, sizes)
        for weight in weights_of(model)
        if weight.optimizer == "muon"
    ]
    for piece in _joined(pieces):
        stack, moved = _whole(piece, sizes)
        stacks.append(stack)
        sent += moved
    for stack in _joined(stacks):
        share, moved = _share_out(stack, sizes)
        shares.append(share)
        sent += moved
    return Muon(tuple(_joined(shares)), tuple(sent))


def _pieces(weight: Weight, parts, sizes: Mapping[str, int]) -> Stack:
    """What one device holds of a weight.

    `alike` has the axes that cut rows, those that cut columns, and those along which devices hold
    copies.
    """
    rows, columns = (math.prod(sizes[axis] for axis in part) for part in parts[-2:])
    count = math.prod(weight.shape[:-2]) // math.prod(
        sizes[axis] for part in parts[:-2] for axis in part
    )
    used = [axis for part in parts for axis in part]
    copies = tuple(axis for axis, size in sizes.items() if size > 1 and axis not in used)
    return Stack(
        (weight.shape[-2] // rows, weight.shape[-1] // columns),
        count,
        (tuple(parts[-2]), tuple(parts[-1]), copies),
    )


def _whole(piece: Stack, sizes: Mapping[str, int]) -> tuple[Stack, list[tuple[str, str, float]]]:
    """This device's share of the matrices, whole, and what is sent for it, there and back."""
    (rows, columns, copies), (height, width), count, sent, alike = (
        piece.alike,
        piece.shape,
        piece.count,
        [],
        [],
    )
    for axis in copies:
        if count >= sizes[axis]:  # results are gathered once they are pieces again
            count = -(-count // sizes[axis])
            sent.append((axis, "all-gather", 4 * height * width * count * (sizes[axis] - 1)))
        else:
            alike.append(axis)
    for axes in (rows, columns):
        for axis in reversed(axes):
            size, bytes_ = sizes[axis], 4 * height * width
            if count == 1:
                sent.append((axis, "all-gather", bytes_ * (size - 1)))
                alike.append(axis)
            else:
                count = -(-count // size)
                sent.append((axis, "all-to-all", 2 * bytes_ * count * (size - 1)))
            height, width = (height * size, width) if axes is rows else (height, width * size)
    return Stack((height, width), count, tuple(alike)), sent


def _share_out(
    stack: Stack, sizes: Mapping[str, int]
) -> tuple[Stack, list[tuple[str, str, float]]]:
    """One device's share of matrices that several hold alike, and what it sends to gather results.

    An axis with more devices than there are matrices is skipped.
    """
    sent, count = [], stack.count
    for axis in stack.alike:
        if count >= sizes[axis]:
            count = -(-count // sizes[axis])
            sent.append(
                (axis, "all-gather", 4 * math.prod(stack.shape) * count * (sizes[axis] - 1))
            )
    return Stack(stack.shape, count), sent


def _joined(stacks: Iterable[Stack]) -> list[Stack]:
    """Joins stacks of one shape that are alike, up to TOGETHER bytes."""
    groups: dict[tuple, list[Stack]] = {}
    for stack in stacks:
        group = groups.setdefault((stack.shape, stack.alike), [])
        if group and group[-1].bytes + stack.bytes <= TOGETHER:
            group[-1] = group[-1]._replace(count=group[-1].count + stack.count)
        else:
            group.append(stack)
    return [stack for group in groups.values() for stack in group]
