"""The terms of the loss and their weights, one line each.

Equations: docs/equations.md#losses.
Next file to read: v4jax/train/loss.py.
"""

import dataclasses
from collections.abc import Callable, Iterator

from v4jax.train.losses import balance, indexer, mtp, next_token


def _weight(default: float, term: Callable) -> float:
    """A field of LossWeights: its default, and term(hidden, batch, ctx) -> (value, metrics).

    The value is a float32 scalar, or None where the term does not apply.
    """
    return dataclasses.field(default=default, metadata={"term": term})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the terms of the loss (docs/equations.md#losses); next token has weight 1.

    DeepSeek has not published the weight of the indexer's loss.
    """

    balance: float = _weight(1e-4, balance.term)
    """Weight of the balance loss of each sequence's experts, 0 or more."""
    mtp: float = _weight(0.3, mtp.term)
    """Weight of the multi-token-prediction loss, 0 or more."""
    index: float = _weight(1.0, indexer.term)
    """Weight of the indexer's loss, summed over CSA layers; 0 or more."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            weight = getattr(self, field.name)
            if not weight >= 0:
                raise ValueError(f"loss weight {field.name}: got {weight}; must be 0 or above")

    def terms(self) -> Iterator[tuple[float, Callable]]:
        """(weight, term) of every term, in the order in which they are added."""
        yield 1.0, next_token.term
        for field in dataclasses.fields(self):
            yield getattr(self, field.name), field.metadata["term"]
