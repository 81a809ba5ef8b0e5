"""What a run minimises: the terms of its objective, and the frozen models that these compare with.

    next_token   what the text says next; conversations: what the assistant wrote (SFT)
    dpo          the chosen answer of a pair rather than the rejected one; reference: the base
    distill      the distributions of teachers, adapters of the same base

Reference and teachers share the weights of the policy, so they cost forward passes and no memory.

Equations: docs/equations.md#losses.
Next file to read: v4jax/train/losses/dpo.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax

from v4jax.adapters.config import adapts_indexer
from v4jax.context import Collect, Context
from v4jax.functional import apply
from v4jax.model.transformer import Hidden
from v4jax.parameter_tree import ADAPTERS, TEACHERS
from v4jax.train.losses import balance, distill, dpo
from v4jax.train.losses.distill import Distill
from v4jax.train.losses.dpo import Dpo
from v4jax.train.losses.term import Term

MEASURES = {"next_token": "nll", "dpo": "dpo", "distill": "kl"}
"""Objective -> the metric that ranks checkpoints on held-out data."""


def terms_of(cfg, frozen: Sequence[Hidden] = ()) -> list[tuple[float, Term]]:
    """(weight, term) of each term of the objective of a TrainConfig, the main one first.

    Args:
      frozen: what `frozen_models` returns for the batch; () for what terms count.
    """
    if cfg.objective == "next_token":
        return list(cfg.loss.terms())
    main = dpo.term(cfg.dpo, frozen)
    if cfg.objective == "distill":
        main = distill.term(cfg.distill, frozen)
    return [(1.0, main), (cfg.loss.balance, balance.LAYERS)]


def frozen_passes(cfg) -> int:
    """Forward passes of frozen models for each batch of a step."""
    return {"next_token": 0, "dpo": 1, "distill": len(cfg.distill.teachers)}[cfg.objective]


def passes_of(cfg) -> int:
    """Products of a step with each weight, for each token.

    One forward and two backward; a frozen weight has no gradient, which is one less.
    """
    return (3 if cfg.lora is None else 2) + frozen_passes(cfg)


def frozen_models(cfg, ctx: Context, params, batch: Mapping[str, jax.Array]) -> tuple[Hidden, ...]:
    """What reference or teachers make of a batch, constants; () for next_token.

    Args:
      params: the public dict; its pairs are left out, those of teachers are used one by one.
    """
    if cfg.objective == "next_token":
        return ()
    base = {name: tree for name, tree in params.items() if name not in (ADAPTERS, TEACHERS)}
    pairs = [{}]
    if cfg.objective == "distill":
        pairs = [
            {ADAPTERS: params[TEACHERS][str(n)]} if name else {}
            for n, name in enumerate(cfg.distill.teachers)
        ]
    sparse = dataclasses.replace(ctx.sparse, train_indexer=False)
    ctx = dataclasses.replace(
        ctx, sparse=sparse, collect=Collect(), remat="none", frozen=True, dropout=0.0
    )
    inputs = batch["tokens"], batch.get("segment_ids")
    with jax.named_scope("reference"):
        found = [apply(cfg.model, base | one, *inputs, ctx=ctx) for one in pairs]
    return tuple(map(jax.lax.stop_gradient, found))


def check_objective(cfg) -> None:
    """Checks that the fields of a TrainConfig fit its objective.

    Raises:
      ValueError: names the field, what was got and what is allowed.
    """
    name = cfg.objective
    if name not in MEASURES:
        raise ValueError(f"objective: got {name!r}; allowed: {', '.join(MEASURES)}")
    for field, unset in (("dpo", Dpo()), ("distill", Distill())):
        if getattr(cfg, field) != unset and name != field:
            got = getattr(cfg, field)
            raise ValueError(f"{field}: got {got} with objective {name}; only {field} reads it")
    if name == "distill" and not any(cfg.distill.teachers):
        raise ValueError(
            f"distill.teachers: got {cfg.distill.teachers}; at least one must be an adapter: the "
            "student begins as the base"
        )
    if cfg.data.paired != (name == "dpo"):
        formats = ", ".join(source.format for source in cfg.data.sources)
        wanted = "preference" if name == "dpo" else "another: only objective dpo reads pairs"
        raise ValueError(f"data.format: got {formats} with objective {name}; must be {wanted}")
    if name != "next_token":
        _check_frozen(cfg)


def _check_frozen(cfg) -> None:
    """What an objective with frozen models needs, and what has no part in it."""
    name = f"with objective {cfg.objective}"
    if cfg.lora is None:
        raise ValueError(f"lora: got None {name}; must be set: all models share its base")
    rules = [
        ("attention", cfg.attention, cfg.attention != "indexer", "sparse or dense"),
        ("index_learning_rate", cfg.index_learning_rate, not cfg.index_learning_rate, "0"),
        (
            "bias_rate",
            cfg.router_bias_rate,
            not cfg.router_bias_rate,
            "0: all models share one router",
        ),
    ]
    for field, got, holds, rule in rules:
        if not holds:
            raise ValueError(f"{field}: got {got} {name}; must be {rule}")
    if adapts_indexer(cfg.model, cfg.lora):
        raise ValueError(f"lora.targets: got {cfg.lora.targets} {name}; must not name the indexer")
    weights = [stage.mtp for stage in cfg.stages if stage.mtp is not None]
    if weights:
        raise ValueError(f"stages: got an MTP weight of {weights[0]} {name}, which has no MTP loss")
