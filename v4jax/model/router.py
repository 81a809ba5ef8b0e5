"""The router: scores of experts, the choice of a token's experts, and their weights.

Scores and weights are float32 (docs/equations.md#moe, official `Gate`).

Shapes: B batch, S positions, D hidden, E experts, K active experts, V vocabulary, R rounds; lower
case = this device's share.
Next file to read: v4jax/model/balance.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sharding.manual import on_own_tokens
from sharding.rules import AxisRules
from v4jax.context import Context
from v4jax.diagnostics import Diagnostics
from v4jax.model.adapted import Weight, product


class Routing(NamedTuple):
    """Results of one layer's router.

    Attributes:
      load_E: float32, tokens of the whole batch that chose each expert; the sum is K per token that
        counts.
      balance: float32 scalar, balance loss (docs/equations.md#losses); 0 in hash layers, where
        nothing that the gate learns would move a token.
      index_BSK: int32, experts that the scores chose; None if hash-routed or without Collect.index.
      diagnostics: those of the whole layer (v4jax/diagnostics.py); None without Collect.watch.
    """

    load_E: jax.Array
    balance: jax.Array
    index_BSK: jax.Array | None = None
    diagnostics: Diagnostics | None = None


def router_scores(x_BSD: jax.Array, gate_DE: Weight, ctx: Context = Context()) -> jax.Array:
    """sqrt(softplus(x @ gate)), float32 [B,S,E]."""
    logit = product(ctx, x_BSD.astype(jnp.float32), gate_DE)
    # Below -20, softplus(z) is exp(z) to float32 precision, and its root is exp(z / 2). The split
    # keeps the gradient of the root finite at any logit. The clip at -160 keeps every score above
    # 0, or a token whose experts all score 0 would have no weights.
    low = logit < -20
    small = jnp.exp(jnp.clip(logit, -160, -20) / 2)
    return jnp.where(low, small, jnp.sqrt(jax.nn.softplus(jnp.where(low, 0, logit))))


def gate_weights(score_BSE: jax.Array, index_BSK: jax.Array, scale: float) -> jax.Array:
    """Weights of the chosen experts: score[index] / sum(score[index]) * scale, [B,S,K].

    Scores are unbiased: the bias selects only (docs/equations.md#trap-27).
    """
    chosen = jax.nn.one_hot(index_BSK, score_BSE.shape[-1], dtype=bool)
    picked = jnp.sum(jnp.where(chosen, score_BSE[:, :, None], 0), axis=-1)
    return shares(picked) * scale


def shares(score: jax.Array) -> jax.Array:
    """score / sum(score) over the last axis, for scores above 0.

    Scores are first divided by the largest: the gradient of a quotient divides by the square of its
    denominator, which float32 rounds to 0 for a sum below 1e-19. A common factor changes no share,
    so it needs no gradient.
    """
    relative = score / jax.lax.stop_gradient(score.max(-1, keepdims=True))
    return relative / relative.sum(-1, keepdims=True)


def choose(rules: AxisRules, score_BSE: jax.Array, active: int) -> jax.Array:
    """The `active` experts of highest score, int32 [B,S,K].

    On a mesh each device chooses for its own tokens: XLA would gather the scores of the whole batch
    on every device for its top-k.
    """

    def top(score_bse):
        return jax.lax.top_k(score_bse, active)[1]

    return on_own_tokens(rules, top, score_BSE)
