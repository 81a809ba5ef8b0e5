"""Kinds of layers, and the repeated patterns that they form.

Next file to read: v4jax/config/validation.py.
"""

from typing import Any, NamedTuple

WINDOW_ONLY, CSA, HCA = 0, 4, 128
"""Compress ratios: sliding window only, CSA and HCA (report 2.3)."""


def is_ratio(value: Any) -> bool:
    """Whether layers with this compress ratio can be built.

    Layers pool as HCA's do at any ratio but CSA's. It must divide HCA's, so that the cache of every
    layer is in whole windows.
    """
    is_size = type(value) is int and 2 <= value <= HCA
    return (type(value) is int and value == WINDOW_ONLY) or (is_size and HCA % value == 0)


class LayerKind(NamedTuple):
    """What tells layers apart: the compress ratio, and whether experts are hash-routed."""

    compress_ratio: int
    hash_routed: bool


class LayerGroup(NamedTuple):
    """`repeats` copies of the pattern `kinds`, from layer `first` on; scanned as one unit."""

    first: int
    kinds: tuple[LayerKind, ...]
    repeats: int

    @property
    def name(self) -> str:
        """The group's key in the parameter tree, for example layers_3_42."""
        return f"layers_{self.first}_{self.first + len(self.kinds) * self.repeats - 1}"

    def layer(self, n: int) -> str:
        """The key of repetition `n` where repetitions are apart, for example layers_3_42_0."""
        return f"{self.name}_{n}"


def groups_of(kinds: tuple[LayerKind, ...]) -> tuple[LayerGroup, ...]:
    """Layers of these kinds, in order, as repeated patterns."""
    groups, start = [], 0
    while start < len(kinds):
        period, repeats = _longest_repeat(kinds[start:])
        groups.append(LayerGroup(start, kinds[start : start + period], repeats))
        start += period * repeats
    return tuple(groups)


def _longest_repeat(kinds: tuple[LayerKind, ...]) -> tuple[int, int]:
    """(period, repeats) of the pattern that covers most layers from the start.

    On a tie it is the shortest pattern.
    """
    best = (1, 1)
    for period in range(1, len(kinds) // 2 + 1):
        repeats = 1
        while kinds[repeats * period : (repeats + 1) * period] == kinds[:period]:
            repeats += 1
        if repeats > 1 and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best
