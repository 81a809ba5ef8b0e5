"""The balance loss: experts of one document should be used alike. Layers compute it as they route.

Equations: docs/equations.md#losses.
Next file to read: v4jax/train/losses/indexer.py.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from v4jax.context import Context
from v4jax.model.transformer import Hidden


def term(hidden: Hidden, batch: Mapping[str, jax.Array], ctx: Context):
    """(loss, {"balance": loss}): the sum over layers."""
    del batch, ctx
    balance = sum(
        jnp.sum(route.balance) for blocks in hidden.routing.values() for route in blocks.values()
    )
    return balance, {"balance": balance}
