"""The indexer's loss: its scores should choose the entries that attention weights most.

It has gradients for the indexer only.

Equation: docs/equations.md#indexer-loss.
Next file to read: v4jax/train/losses/weights.py.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from v4jax.context import Context
from v4jax.model.indexer import IndexLoss
from v4jax.model.transformer import Hidden


def term(hidden: Hidden, batch: Mapping[str, jax.Array], ctx: Context):
    """(loss, metrics of `index_metrics`); (None, {}) where the indexer does not train."""
    del batch
    if not ctx.sparse.train_indexer:
        return None, {}
    metrics = index_metrics(hidden.index)
    return metrics["index_kl"], metrics


def index_metrics(index: Mapping[str, Mapping[str, IndexLoss]]) -> dict[str, jax.Array]:
    """index_kl, index_kl_uniform and index_captured, float32 scalars.

    index_kl is the indexers' loss: the mean over queries, summed over CSA layers. index_kl_uniform
    is the same for scores that are all equal. index_captured is 1 - index_kl / index_kl_uniform.
    """
    layers = [loss for blocks in index.values() for loss in blocks.values()]
    kl, uniform = (
        sum(
            (jnp.sum(getattr(loss, name) / jnp.maximum(loss.count, 1)) for loss in layers),
            jnp.zeros(()),
        )
        for name in ("kl", "uniform")
    )
    captured = 1 - kl / jnp.maximum(uniform, jnp.finfo(jnp.float32).tiny)
    return {"index_kl": kl, "index_kl_uniform": uniform, "index_captured": captured}
