"""The token after the next, as multi-token prediction (MTP) sees it.

Equations: docs/equations.md#losses.
Shapes: B batch, S positions, D hidden, V vocabulary.
Next file to read: v4jax/train/losses/balance.py.
"""

import jax
import jax.numpy as jnp

from v4jax.config import ModelConfig
from v4jax.context import Context
from v4jax.model.transformer import Hidden
from v4jax.train.losses.next_token import mean_nll, targets
from v4jax.train.losses.term import Batch, Term


def mean(hidden: Hidden, batch: Batch, ctx: Context):
    """(loss, {"mtp_nll": loss}) in nats per token; (None, {}) in a model without MTP."""
    if hidden.mtp_x_BSD is None:
        return None, {}
    nll = mean_nll(hidden.mtp_x_BSD, hidden.head_DV, batch, 2, ctx)
    return nll, {"mtp_nll": nll}


def count(cfg: ModelConfig, batch: Batch) -> jax.Array:
    """Number of tokens with a token after the next to be learned."""
    del cfg
    return targets(batch, 2)[1].sum().astype(jnp.float32)


TERM = Term(mean, count)
