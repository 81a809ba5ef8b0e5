"""The loss of a batch: the sum of terms in v4jax/train/losses.

Equations: docs/equations.md#losses.
Next file to read: v4jax/train/balance.py.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from sharding.rules import AxisRules
from v4jax.config import ModelConfig
from v4jax.context import Context
from v4jax.functional import apply
from v4jax.kernels.choice import kernels_from
from v4jax.model.transformer import Hidden
from v4jax.remat import policy_name
from v4jax.train.losses.indexer import captured
from v4jax.train.losses.term import Batch, Term
from v4jax.train.losses.weights import LossWeights


def loss_and_routing(
    cfg: ModelConfig,
    params,
    batch: Mapping[str, jax.Array],
    ctx: Context = Context(),
    *,
    weights: LossWeights = LossWeights(),
    chosen=None,
):
    """(loss, (metrics, routing)) of a batch, next token. Arguments: see `apply` and `loss_of`."""
    hidden = apply(cfg, params, batch["tokens"], batch.get("segment_ids"), ctx=ctx, chosen=chosen)
    total, metrics = loss_of(hidden, batch, ctx, list(weights.terms()))
    return total, (metrics, hidden.routing)


def loss_of(
    hidden: Hidden,
    batch: Batch,
    ctx: Context,
    terms: Sequence[tuple[float, Term]],
    share: Sequence[jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, metrics) of what the network made of a batch.

        loss = sum of weight * term

    Terms that do not apply are left out (v4jax/train/losses).

    Args:
      batch: as for `loss`.
      terms: (weight, term) of each (LossWeights.terms, or terms_of in v4jax/train/objective.py).
      share: this batch's share of each term in a larger batch (`counts_of`), float32 scalars. Loss
        and metrics are then summands of the larger batch's. None: 1 each.
    """
    total, metrics = jnp.zeros(()), {}
    for n, (weight, term) in enumerate(terms):
        with jax.named_scope("loss"):
            value, measured = term.mean(hidden, batch, ctx)
        if share is not None:
            value, measured = jax.tree.map(lambda x, n=n: share[n] * x, (value, measured))
        for name, number in measured.items():
            metrics[name] = metrics[name] + number if name in metrics else number
        if value is not None:
            total = total + weight * value
    if share is None:
        metrics |= captured(metrics)
    return total, metrics | {"loss": total}


def counts_of(
    cfg: ModelConfig, batch: Batch, terms: Sequence[tuple[float, Term]]
) -> list[jax.Array]:
    """What each term counts in a batch, float32 scalars."""
    return [term.count(cfg, batch) for _, term in terms]


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("weights", "rules", "dtype", "remat", "quant", "kernels"),
)
def loss(
    cfg: ModelConfig,
    params,
    batch: Mapping[str, jax.Array],
    *,
    weights: LossWeights = LossWeights(),
    rules: AxisRules = AxisRules(),
    dtype: jnp.dtype = jnp.dtype("float32"),
    remat: str | bool = "none",
    quant: str = "none",
    kernels: str = "",
):
    """The training objective (docs/equations.md#losses); differentiable in params.

    Args:
      params: the nested dict of `v4jax.load` or `init_params`.
      batch: "tokens" int [B,S]; optionally "segment_ids" int [B,S], 0 for padding, and "loss_mask"
        int [B,S], 1 on tokens to be learned. Labels are the row's own next tokens.
      quant: "official" computes with low-precision numbers (QAT); gradients pass straight through
        their rounding.
      remat: what the backward pass recomputes (v4jax/remat.py); True is "layer".
      kernels: implementations of ops, as kernels_from reads them (v4jax/kernels/choice.py); empty:
        the best of the platform.

    Returns:
      (loss, metrics): float32 scalars; metrics has loss, nll, mtp_nll (with MTP) and balance.
    """
    ctx = Context(
        rules=rules,
        dtype=dtype,
        quant=quant,
        kernels=kernels_from(kernels),
        remat=policy_name(remat),
    )
    total, (metrics, _) = loss_and_routing(cfg, params, batch, ctx, weights=weights)
    return total, metrics
