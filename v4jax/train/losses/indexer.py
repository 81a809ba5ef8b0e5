"""The indexer's loss: its scores should choose the entries that attention weights most.

It has gradients for the indexer only.

Equation: docs/equations.md#indexer-loss.
Axes: B batch, S positions.
Next file to read: v4jax/train/losses/weights.py.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from v4jax.config import CSA, ModelConfig
from v4jax.context import Context
from v4jax.model.indexer import IndexLoss
from v4jax.model.segments import read_segments
from v4jax.model.transformer import Hidden
from v4jax.train.losses.term import Batch, Term


def mean(hidden: Hidden, batch: Batch, ctx: Context):
    """(loss, metrics of `index_metrics`); (None, {}) where the indexer does not train."""
    del batch
    if not ctx.sparse.train_indexer:
        return None, {}
    metrics = index_metrics(hidden.index)
    return metrics["index_kl"], metrics


def count(cfg: ModelConfig, batch: Batch) -> jax.Array:
    """Number of queries that see an entry of a CSA layer."""
    tokens_BS, segment_BS = batch["tokens"], batch.get("segment_ids")
    position_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1])[None], tokens_BS.shape)
    if segment_BS is None:
        return jnp.sum(position_BS >= CSA - 1).astype(jnp.float32)
    extent_2BS = read_segments(cfg, tokens_BS.shape[1], segment_BS).extent_2BS
    assert extent_2BS is not None, "segment ids give every token its document's extent"
    first_BS = extent_2BS[0]
    sees_BS = (position_BS - first_BS >= CSA - 1) & (segment_BS > 0)
    return jnp.sum(sees_BS).astype(jnp.float32)


TERM = Term(mean, count)


def index_metrics(index: Mapping[str, Mapping[str, IndexLoss]]) -> dict[str, jax.Array]:
    """index_kl and index_kl_uniform, float32 scalars.

    index_kl is the indexers' loss: the mean over queries, summed over CSA layers. index_kl_uniform
    is the same for scores that are all equal.
    """
    layers = [loss for blocks in index.values() for loss in blocks.values()]
    kl, uniform = (
        sum(
            (jnp.sum(getattr(loss, name) / jnp.maximum(loss.count, 1)) for loss in layers),
            jnp.zeros(()),
        )
        for name in ("kl", "uniform")
    )
    return {"index_kl": kl, "index_kl_uniform": uniform}


def captured(metrics: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """index_captured, 1 - index_kl / index_kl_uniform; {} where the indexer does not train."""
    if "index_kl" not in metrics:
        return {}
    uniform = jnp.maximum(metrics["index_kl_uniform"], jnp.finfo(jnp.float32).tiny)
    return {"index_captured": 1 - metrics["index_kl"] / uniform}
