"""The gradients of a step, of the whole batch at once or micro-batch by micro-batch.

Micro-batches are a loop inside the compiled step, so memory does not grow with their number.
Gradients are summed in float32, each layer's as the backward pass finds them. Each term of the loss
is a mean over what counts in the whole batch: a micro-batch adds its share of it, known from the
documents before any forward pass. So the result is that of one batch, whatever the micro-batches
contain.

Axes: B batch, S positions, M micro-batches, E experts.
Next file to read: v4jax/train/step.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sharding.micro_batches import split_rows
from sharding.rules import AxisRules
from v4jax.context import Context
from v4jax.diagnostics import over_batches
from v4jax.functional import apply
from v4jax.model.router import Routing
from v4jax.model.transformer import Hidden
from v4jax.parameter_tree import spec_of
from v4jax.train.adapters import trained_axes
from v4jax.train.config import TrainConfig
from v4jax.train.loss import counts_of, loss_of
from v4jax.train.losses.indexer import captured
from v4jax.train.objective import frozen_models, terms_of


def gradients(
    cfg: TrainConfig,
    ctx: Context,
    params,
    router,
    batch: Mapping[str, jax.Array],
    chosen=None,
    base: Mapping[str, Any] | None = None,
    key: jax.Array | None = None,
) -> tuple[Any, dict[str, Any], dict[str, dict[str, Routing]]]:
    """(gradients of params, metrics, routing) of cfg.gradient_accumulation micro-batches.

    With attention="indexer" they are those of the indexer's loss alone.

    Args:
      batch, chosen: as for `train_step`.
      base: the frozen weights, with cfg.lora.
      key: of the inputs of low-rank pairs that are dropped; None: none are.
    """

    fixed = dict(base or {}) | {"router": router}
    if cfg.micro_batches > 1 and cfg.lora is not None:
        return _added(cfg, ctx, params, fixed, batch, chosen, key)
    if cfg.micro_batches > 1 or cfg.gather == "step":
        return _summed(cfg, ctx, params, fixed, batch, chosen)

    frozen = frozen_models(cfg, ctx, fixed, batch)

    def objective(params):
        hidden = _hidden(cfg, ctx, fixed | params, batch, chosen, key=key)
        loss, metrics = _loss(cfg, ctx, hidden, batch, frozen=frozen)
        return loss, (metrics, hidden.routing)

    grads, (metrics, routing) = jax.grad(objective, has_aux=True)(params)
    return grads, metrics, routing


def _added(cfg: TrainConfig, ctx: Context, params, fixed, batch, chosen, key):
    """What `gradients` returns, micro-batch by micro-batch, of low-rank pairs.

    They are small, so the gradients of a micro-batch may exist whole.
    """
    rules, count = ctx.rules, cfg.micro_batches
    zeros = _placed(cfg, rules, jax.tree.map(jnp.zeros_like, params))
    numbers_M = jnp.arange(count)
    parts = (split_batch(rules, batch, count), _split_chosen(rules, chosen, count), numbers_M)
    counts_all = counts_of(cfg.model, batch, terms_of(cfg))

    def add(total, part):
        batch, chosen, number = part
        own = None if key is None else jax.random.fold_in(key, number)
        frozen = frozen_models(cfg, ctx, fixed, batch)
        share = _share(cfg, batch, counts_all)

        def objective(params):
            hidden = _hidden(cfg, ctx, fixed | params, batch, chosen, key=own)
            loss, metrics = _loss(cfg, ctx, hidden, batch, share, frozen)
            return loss, (metrics, hidden.routing)

        grads, results = jax.grad(objective, has_aux=True)(params)
        return _placed(cfg, rules, jax.tree.map(jnp.add, total, grads)), results

    return _of_scan(jax.lax.scan(add, zeros, parts))


def _summed(cfg: TrainConfig, ctx: Context, params, fixed, batch, chosen):
    """What `gradients` returns, micro-batch by micro-batch (v4jax/gradient_sums.py)."""
    rules, count = ctx.rules, cfg.micro_batches
    zeros = _placed(cfg, rules, jax.tree.map(jnp.zeros_like, params))
    parts = (split_batch(rules, batch, count), _split_chosen(rules, chosen, count))
    counts_all = counts_of(cfg.model, batch, terms_of(cfg))
    if cfg.gather == "step":
        params = _gathered(cfg, ctx, params)
        ctx = dataclasses.replace(ctx, rules=rules.whole_weights(), sums=rules)

    def add(total, part):
        batch, chosen = part
        share = _share(cfg, batch, counts_all)

        def objective(sums):
            hidden = _hidden(cfg, ctx, fixed | params, batch, chosen, sums)
            loss, metrics = _loss(cfg, ctx, hidden, batch, share)
            return (loss, hidden.sums), (metrics, hidden.routing)

        _, backward, results = jax.vjp(objective, zeros, has_aux=True)
        (total,) = backward((jnp.ones(()), total))
        return total, results

    return _of_scan(jax.lax.scan(add, zeros, parts))


def _of_scan(results):
    """What `gradients` returns, of a loop over micro-batches."""
    grads, (metrics_M, routing_M) = results
    metrics = {name: value_M.sum() for name, value_M in metrics_M.items()}
    return grads, metrics | captured(metrics), _of_all(routing_M)


def _share(cfg: TrainConfig, batch, counts_all) -> list[jax.Array]:
    """A micro-batch's share of each term of the loss."""
    counts = counts_of(cfg.model, batch, terms_of(cfg))
    return [n / jnp.maximum(n_all, 1) for n, n_all in zip(counts, counts_all, strict=True)]


def _hidden(cfg: TrainConfig, ctx: Context, params, batch, chosen, sums=None, key=None) -> Hidden:
    tokens, segments = batch["tokens"], batch.get("segment_ids")
    return apply(cfg.model, params, tokens, segments, ctx=ctx, chosen=chosen, sums=sums, key=key)


def _loss(cfg: TrainConfig, ctx: Context, hidden: Hidden, batch, share=None, frozen=()):
    """(what the stage minimises, metrics)."""
    loss, metrics = loss_of(hidden, batch, ctx, terms_of(cfg, frozen), share)
    return cfg.loss.index * metrics["index_kl"] if cfg.attention == "indexer" else loss, metrics


def split_batch(rules: AxisRules, batch: Mapping[str, jax.Array], count: int):
    """The arrays [B,S] of a batch as micro-batches [M,B/M,S]; no row travels."""
    return {name: split_rows(rules, x_BS, count) for name, x_BS in batch.items()}


def _split_chosen(rules: AxisRules, chosen, count: int):
    """Experts chosen beforehand for each micro-batch; None stays None."""
    return jax.tree.map(lambda x: split_rows(rules, x, count, axis=x.ndim - 3), chosen)


def _placed(cfg: TrainConfig, rules: AxisRules, grads):
    """Gradients where their weights lie, so that what is summed is cut as they are."""
    return jax.tree.map(lambda x, names: rules.constrain(x, *names), grads, _axes(cfg, grads))


def _gathered(cfg: TrainConfig, ctx: Context, params):
    """The weights in the dtype that products use, gathered over FSDP axes."""

    def whole(path, w, names):
        spec = spec_of(tuple(key.key for key in path))
        exact = spec.float32 or ctx.quant != "none"  # formats round what float32 holds
        w = w.astype(jnp.float32 if exact else ctx.dtype)
        return ctx.rules.gather(w, names)

    return jax.tree_util.tree_map_with_path(whole, params, _axes(cfg, params))


def _axes(cfg: TrainConfig, params):
    return {name: tree for name, tree in trained_axes(cfg).items() if name in params}


def _of_all(routing_M):
    """Routing of the whole batch: loads and balance are sums over micro-batches."""

    def reduce(route: Routing) -> Routing:
        found = route.diagnostics
        return Routing(
            route.load_E.sum(0),
            route.balance.sum(0),
            diagnostics=None if found is None else over_batches(found),
        )

    return {
        group: {name: reduce(route) for name, route in blocks.items()}
        for group, blocks in routing_M.items()
    }
