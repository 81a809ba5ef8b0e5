"""What a term of the loss is.

Next file to read: v4jax/train/losses/next_token.py.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax

Batch = Mapping[str, jax.Array]
"""tokens, segment_ids and loss_mask, int [B,S]; the last two may be missing."""


class Term(NamedTuple):
    """A mean over what counts in a batch.

    Attributes:
      mean: (Hidden, Batch, Context) -> (float32 scalar, or None where the term does not apply;
        metrics, which are means over the same).
      count: (ModelConfig, Batch) -> how much that is, float32 scalar. It needs no forward pass, so
        that micro-batches can be weighted by their share of the whole batch.
      costly: whether `mean` adds work of its own, such as logits. A costly term of weight 0 is
        left out; others are measured at any weight.
    """

    mean: Callable
    count: Callable
    costly: bool = False
