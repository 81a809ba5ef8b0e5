"""The terms of the loss and their weights, one line each.

Equations: docs/equations.md#losses.
Next file to read: v4jax/train/loss.py.
"""

import dataclasses
from collections.abc import Iterator

from v4jax.train.losses import balance, indexer, mtp, next_token
from v4jax.train.losses.term import Term


def _weight(default: float, *terms: Term) -> float:
    """A field of LossWeights: its default, and the terms that it weights."""
    return dataclasses.field(default=default, metadata={"terms": terms})


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the terms of the loss (docs/equations.md#losses); next token has weight 1.

    DeepSeek has not published the weight of the indexer's loss.
    """

    balance: float = _weight(1e-4, balance.LAYERS, balance.MTP)
    """Weight of the balance loss of each sequence's experts, 0 or more."""
    mtp: float = _weight(0.3, mtp.TERM)
    """Weight of the multi-token-prediction loss, 0 or more."""
    index: float = _weight(1.0, indexer.TERM)
    """Weight of the indexer's loss, summed over CSA layers; 0 or more."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            weight = getattr(self, field.name)
            if not weight >= 0:
                raise ValueError(f"loss weight {field.name}: got {weight}; must be 0 or above")

    def terms(self) -> Iterator[tuple[float, Term]]:
        """(weight, term) of every term that is computed, in the order in which they are added."""
        yield 1.0, next_token.TERM
        for field in dataclasses.fields(self):
            weight = getattr(self, field.name)
            for term in field.metadata["terms"]:
                if weight > 0 or not term.costly:
                    yield weight, term
