"""Distillation: the student's distribution of each learned token close to those of teachers.

The divergence is KL(student || teacher) over the whole vocabulary, the objective by which V4's
report merges its experts on the student's own samples. Logits of student and teachers exist for a
few positions at a time and stay cut where the vocabulary is.

Equations: docs/equations.md#distillation.
Shapes: B batch, S positions, D hidden, V vocabulary.
Next file to read: v4jax/train/losses/mtp.py.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from v4jax.context import Context
from v4jax.model.adapted import factors
from v4jax.model.transformer import Hidden
from v4jax.storage import checkpoint_name
from v4jax.train.losses.next_token import (
    LOGIT_BYTES,
    chunk_logits,
    count,
    in_chunks,
    log_total,
    targets,
    varying,
)
from v4jax.train.losses.term import Batch, Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill:
    """Settings of distillation (docs/equations.md#distillation)."""

    teachers: tuple[str, ...] = ()
    """Adapters of the same base, folders as a run or PEFT writes them; an empty name is the base
    itself."""
    weights: tuple[float, ...] = ()
    """Weight of each teacher's divergence, above 0; empty: equal ones that add up to 1."""

    def __post_init__(self):
        for name in ("teachers", "weights"):
            got = getattr(self, name)
            if isinstance(got, str) or not isinstance(got, Sequence):
                raise ValueError(f"distill.{name}: got {got!r}; must be a tuple, one a teacher")
            object.__setattr__(self, name, tuple(got))
        for name in filter(None, self.teachers):
            checkpoint_name(name, "distill.teachers")
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"distill.weights: got {self.weights}; each must be above 0")
        if self.weights and len(self.weights) != len(self.teachers):
            raise ValueError(
                f"distill.weights: got {len(self.weights)}; must be one for each of "
                f"{len(self.teachers)} teacher(s)"
            )

    @property
    def shares(self) -> tuple[float, ...]:
        """`weights`, or equal ones."""
        return self.weights or (1 / len(self.teachers),) * len(self.teachers)


def term(cfg: Distill, frozen: Sequence[Hidden] = ()) -> Term:
    """The term of the loss, a mean over learned tokens.

    Args:
      frozen: what each teacher makes of the batch; () for `count` alone.
    """
    return Term(functools.partial(mean, cfg, frozen), count)


def mean(cfg: Distill, frozen: Sequence[Hidden], hidden: Hidden, batch: Batch, ctx: Context):
    """(loss, metrics): kl, the weighted sum, and teacher_N_kl of each; nats per token."""
    _, learned_BS = targets(batch, 1)
    tokens = jnp.maximum(learned_BS.sum(), 1)
    each = [
        jnp.sum(jnp.where(learned_BS, kl_BS, 0)) / tokens
        for kl_BS in divergences(ctx, hidden, frozen)
    ]
    total = sum(share * kl for share, kl in zip(cfg.shares, each, strict=True))
    return total, {"kl": total} | {f"teacher_{n}_kl": kl for n, kl in enumerate(each)}


def divergences(ctx: Context, student: Hidden, teachers: Sequence[Hidden]) -> list[jax.Array]:
    """KL(student || teacher) of each position's next token, float32 [B,S] for each teacher.

    It has gradients for the student alone. Devices that cut the vocabulary exchange maxima and
    sums.
    """
    rules = ctx.rules
    models = [factors(ctx, one.x_BSD, one.head_DV) for one in (student, *teachers)]
    rows, columns = ([[pair[n] for pair in one] for one in models] for n in (0, 1))
    if not rules:
        return _divergences(ctx, (), rows, columns)
    tokens = rules.spec(("act_batch", "act_seq"))
    return jax.shard_map(
        functools.partial(_divergences, ctx, rules.mesh_axes("vocab")),
        in_specs=(rules.spec(("act_batch", "act_seq", None)), rules.spec((None, "vocab"))),
        out_specs=[tokens] * len(teachers),
    )(rows, columns)


def _divergences(ctx: Context, words: tuple[str, ...], rows, columns) -> list[jax.Array]:
    """`divergences` of one device's positions; factors of the logits of student, then teachers."""
    models = [varying(words, *one) for one in zip(rows, columns, strict=True)]
    rows, columns = ([one[n] for one in models] for n in (0, 1))
    size = 4 * rows[0][0].shape[0] * columns[0][0].shape[1] * len(models)

    def kl(rows) -> list[jax.Array]:
        own, *others = (chunk_logits(ctx, *one) for one in zip(rows, columns, strict=True))
        own_total = log_total(own, words)
        p = jnp.exp(own - own_total[..., None])
        found = []
        for other in map(jax.lax.stop_gradient, others):
            apart = jnp.sum(p * (own - other), -1)
            apart = jax.lax.psum(apart, words) if words else apart
            found.append(apart - own_total + log_total(other, words))
        return found

    return in_chunks(kl, LOGIT_BYTES // size, (rows,))
