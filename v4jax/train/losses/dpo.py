"""Direct preference optimisation (DPO): the chosen answer of a pair more likely than the rejected.

"More" is in comparison with a frozen reference, the base without adapter. A row holds a pair as
segments 2k + 1 (chosen) and 2k + 2 (rejected), see v4jax/data/pairs.py.

Equations: docs/equations.md#dpo.
Shapes: B batch, S positions, D hidden, V vocabulary.
Next file to read: v4jax/train/losses/distill.py.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from v4jax.config import ModelConfig
from v4jax.context import Context
from v4jax.model.transformer import Hidden
from v4jax.train.losses.next_token import targets, token_nll
from v4jax.train.losses.term import Batch, Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpo:
    """Settings of DPO (docs/equations.md#dpo)."""

    beta: float = 0.1
    """Reward for a nat of log likelihood above the reference's; above 0. The larger, the closer
    the policy stays to the reference."""
    label_smoothing: float = 0.0
    """Share of the pairs whose answers are taken to be swapped by mistake, in [0, 0.5)."""
    per_token: bool = False
    """Rewards are means over the tokens of an answer instead of sums."""
    sft: float = 0.0
    """Weight of the chosen answers' own loss, in nats per token; 0 or more."""

    def __post_init__(self):
        _require("beta", self.beta, 0 < self.beta < math.inf, "above 0")
        smoothed = 0 <= self.label_smoothing < 0.5
        _require("label_smoothing", self.label_smoothing, smoothed, "in [0, 0.5)")
        _require("sft", self.sft, 0 <= self.sft < math.inf, "0 or above")


def _require(name: str, got: float, holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"dpo.{name}: got {got}; must be {rule}")


def term(cfg: Dpo, frozen: Sequence[Hidden] = ()) -> Term:
    """The term of the loss, a mean over pairs.

    Args:
      frozen: what the reference makes of the batch; () for `count` alone.
    """
    return Term(functools.partial(mean, cfg, frozen), count)


def mean(cfg: Dpo, frozen: Sequence[Hidden], hidden: Hidden, batch: Batch, ctx: Context):
    """(loss, metrics): means over pairs, float32 scalars.

    Metrics: dpo (the loss without `sft`), margin (reward of the chosen answer minus that of the
    rejected one), accuracy (share of pairs whose margin is above 0), reward_chosen,
    reward_rejected, and chosen_nll in nats per token.
    """
    (reference,) = frozen
    label_BS, learned_BS = targets(batch, 1)
    nll_BS, reference_nll_BS = (
        jnp.where(learned_BS, token_nll(ctx, one.x_BSD, one.head_DV, label_BS), 0)
        for one in (hidden, reference)
    )
    segment_BS = batch["segment_ids"]
    chosen_BS, pair_BS = segment_BS % 2 == 1, (segment_BS + 1) // 2
    length_BS = jnp.maximum(_over_run(ctx, learned_BS.astype(jnp.float32), segment_BS), 1)
    reward_BS = cfg.beta * (reference_nll_BS - nll_BS) / (length_BS if cfg.per_token else 1)
    margin_BS = _up_to(ctx, jnp.where(chosen_BS, reward_BS, -reward_BS), pair_BS)
    ends_BS = _ends(pair_BS)
    pairs = jnp.maximum(ends_BS.sum(), 1)

    def over_pairs(where_BS, x_BS):
        return jnp.sum(jnp.where(where_BS, x_BS, 0)) / pairs

    swapped = cfg.label_smoothing
    losses_BS = -(1 - swapped) * jax.nn.log_sigmoid(margin_BS)
    losses_BS -= swapped * jax.nn.log_sigmoid(-margin_BS)
    dpo = over_pairs(ends_BS, losses_BS)
    chosen_nll = over_pairs(chosen_BS, nll_BS / length_BS)
    return dpo + cfg.sft * chosen_nll, {
        "dpo": dpo,
        "margin": over_pairs(ends_BS, margin_BS),
        "accuracy": over_pairs(ends_BS, (margin_BS > 0).astype(jnp.float32)),
        "reward_chosen": over_pairs(chosen_BS, reward_BS),
        "reward_rejected": over_pairs(~chosen_BS, reward_BS),
        "chosen_nll": chosen_nll,
    }


def count(cfg: ModelConfig, batch: Batch) -> jax.Array:
    """Number of pairs."""
    del cfg
    return _ends((batch["segment_ids"] + 1) // 2).sum().astype(jnp.float32)


def _ends(pair_BS: jax.Array) -> jax.Array:
    """Whether a position is the last of its pair; padding is in no pair."""
    after_BS = jnp.pad(pair_BS[:, 1:], ((0, 0), (0, 1)))
    return (pair_BS != after_BS) & (pair_BS > 0)


def _up_to(ctx: Context, x_BS: jax.Array, run_BS: jax.Array) -> jax.Array:
    """The sum of x from the first position of a run up to each position; a run has one number.

    Example: x [1 2 3 4] in runs [1 1 2 2] gives [1 3 3 7]. Each run is added up by itself, so the
    sum of a short one does not carry the rounding of a row, and always in the same order.
    """
    whole = ("act_batch", None)  # one number a token: rows are not cut
    x_BS, run_BS = (ctx.rules.constrain(x, *whole) for x in (x_BS, run_BS))
    begins_BS = jnp.pad(run_BS[:, 1:] != run_BS[:, :-1], ((0, 0), (1, 0)), constant_values=True)

    def add(before, after):
        total, begun = before
        x, begins = after
        return jnp.where(begins, x, total + x), begun | begins

    return jax.lax.associative_scan(add, (x_BS, begins_BS), axis=1)[0]


def _over_run(ctx: Context, x_BS: jax.Array, run_BS: jax.Array) -> jax.Array:
    """The sum of x over the whole run of each position; x counts something, so it is exact."""
    from_there_BS = _up_to(ctx, x_BS[:, ::-1], run_BS[:, ::-1])[:, ::-1]
    return _up_to(ctx, x_BS, run_BS) + from_there_BS - x_BS
