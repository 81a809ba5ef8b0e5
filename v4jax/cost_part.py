"""The cost of one part of a model, and sums of such costs.

Next file to read: v4jax/parameters.py.
"""

from collections.abc import Iterable
from typing import NamedTuple


class Part(NamedTuple):
    """The cost of one part of the model.

    Attributes:
      parameters: all of its parameters.
      active: those that one token uses.
      flops: forward FLOPs of one token.
      cache: bytes that the KV cache of one sequence holds.
    """

    name: str
    parameters: int = 0
    active: int = 0
    flops: float = 0
    cache: int = 0


def total_of(name: str, parts: Iterable[Part]) -> Part:
    """The sum of the parts, under a name of its own."""
    parts = list(parts)
    return Part(
        name,
        sum(part.parameters for part in parts),
        sum(part.active for part in parts),
        sum(part.flops for part in parts),
        sum(part.cache for part in parts),
    )


def times(part: Part, layers: int) -> Part:
    """The cost of `layers` such parts."""
    return Part(
        part.name,
        layers * part.parameters,
        layers * part.active,
        layers * part.flops,
        layers * part.cache,
    )
