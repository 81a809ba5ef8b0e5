"""The balance loss: experts of one document should be used alike. Layers compute it as they route.

It is two terms, because MTP's layer counts other tokens than the main layers: no document's last.

Equations: docs/equations.md#losses.
Axes: B batch, S positions.
Next file to read: v4jax/train/losses/indexer.py.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from v4jax.config import ModelConfig
from v4jax.context import Context
from v4jax.model.router import Routing
from v4jax.model.segments import read_segments, without_last_tokens
from v4jax.model.transformer import Hidden
from v4jax.train.losses.term import Batch, Term


def mean(hidden: Hidden, batch: Batch, ctx: Context):
    """(loss, {"balance": loss}): the sum over the main layers."""
    del batch, ctx
    groups = [blocks for group, blocks in hidden.routing.items() if group != "mtp"]
    return _sum(groups)


def mtp_mean(hidden: Hidden, batch: Batch, ctx: Context):
    """(loss, {"balance": loss}) of MTP's layer; (None, {}) in a model without MTP."""
    del batch, ctx
    return _sum([hidden.routing["mtp"]]) if "mtp" in hidden.routing else (None, {})


def _sum(groups: Sequence[Mapping[str, Routing]]):
    balance = sum(jnp.sum(route.balance) for blocks in groups for route in blocks.values())
    return balance, {"balance": balance}


def count(cfg: ModelConfig, batch: Batch) -> jax.Array:
    """Number of tokens that are no padding."""
    counts_BS = read_segments(cfg, batch["tokens"].shape[1], batch.get("segment_ids")).counts_BS
    if counts_BS is None:
        return jnp.float32(batch["tokens"].size)
    return counts_BS.sum().astype(jnp.float32)


def mtp_count(cfg: ModelConfig, batch: Batch) -> jax.Array:
    """Number of tokens that are no padding and no document's last."""
    segments = read_segments(cfg, batch["tokens"].shape[1], batch.get("segment_ids"))
    counts_BS = without_last_tokens(segments, batch["tokens"]).counts_BS
    assert counts_BS is not None, "a document's last token does not count"
    return counts_BS.sum().astype(jnp.float32)


LAYERS, MTP = Term(mean, count), Term(mtp_mean, mtp_count)
