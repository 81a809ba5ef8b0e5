"""The training objective: the sum of the terms in v4jax/train/losses.

Equations: docs/equations.md#losses.
Next file to read: v4jax/train/balance.py.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from sharding.rules import AxisRules
from v4jax.config import ModelConfig
from v4jax.context import Context
from v4jax.model.forward import apply
from v4jax.train.losses.weights import LossWeights


def loss_and_routing(
    cfg: ModelConfig,
    params,
    batch: Mapping[str, jax.Array],
    ctx: Context = Context(),
    *,
    weights: LossWeights = LossWeights(),
    remat: bool = False,
    chosen=None,
):
    """(loss, (metrics, routing)) of a batch.

        loss = nll + mtp weight * mtp_nll + balance weight * balance + index weight * index_kl

    Terms that do not apply are left out (v4jax/train/losses). Arguments are those of `loss`; `ctx`
    and `chosen` go to the model.
    """
    hidden = apply(
        cfg, params, batch["tokens"], batch.get("segment_ids"), ctx=ctx, remat=remat, chosen=chosen
    )
    total, metrics = jnp.zeros(()), {}
    for weight, term in weights.terms():
        value, measured = term(hidden, batch, ctx)
        metrics |= measured
        if value is not None:
            total = total + weight * value
    return total, (metrics | {"loss": total}, hidden.routing)


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("weights", "rules", "dtype", "remat", "quant")
)
def loss(
    cfg: ModelConfig,
    params,
    batch: Mapping[str, jax.Array],
    *,
    weights: LossWeights = LossWeights(),
    rules: AxisRules = AxisRules(),
    dtype: jnp.dtype = jnp.float32,
    remat: bool = False,
    quant: str = "none",
):
    """The training objective (docs/equations.md#losses); differentiable in params.

    Args:
      params: the nested dict of `v4jax.load` or `init_params`.
      batch: "tokens" int [B,S]; optionally "segment_ids" int [B,S], 0 for padding, and "loss_mask"
        int [B,S], 1 on tokens to be learned. Labels are the row's own next tokens.
      quant: "official" computes with low-precision numbers (QAT); gradients pass straight through
        their rounding.

    Returns:
      (loss, metrics): float32 scalars; metrics has loss, nll, mtp_nll (with MTP) and balance.
    """
    ctx = Context(rules=rules, dtype=dtype, quant=quant)
    total, (metrics, _) = loss_and_routing(cfg, params, batch, ctx, weights=weights, remat=remat)
    return total, metrics
