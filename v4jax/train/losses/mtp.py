"""The token after the next, as multi-token prediction (MTP) sees it.

Equations: docs/equations.md#losses.
Shapes: B batch, S positions, D hidden, V vocabulary.
Next file to read: v4jax/train/losses/balance.py.
"""

from collections.abc import Mapping

import jax

from v4jax.context import Context
from v4jax.model.transformer import Hidden
from v4jax.train.losses.next_token import mean_nll


def term(hidden: Hidden, batch: Mapping[str, jax.Array], ctx: Context):
    """(loss, {"mtp_nll": loss}) in nats per token; (None, {}) in a model without MTP."""
    if hidden.mtp_x_BSD is None:
        return None, {}
    nll = mean_nll(hidden.mtp_x_BSD, hidden.head_DV, batch, 2, ctx.rules)
    return nll, {"mtp_nll": nll}
