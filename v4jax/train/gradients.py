"""The gradients of a step, of the whole batch at once or micro-batch by micro-batch.

Micro-batches are a loop inside the compiled step, so memory does not grow with their number.
Gradients are summed in float32. Each term of the loss is a mean over what counts in the whole
batch: a micro-batch adds its share of it, known from the documents before any forward pass. So the
result is that of one batch, whatever the micro-batches contain.

Axes: B batch, S positions, M micro-batches, E experts.
Next file to read: v4jax/train/step.py.
"""

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
from v4jax.parameter_tree import param_axes
from v4jax.train.config import TrainConfig
from v4jax.train.loss import counts_of, loss_of
from v4jax.train.losses.indexer import captured


def gradients(
    cfg: TrainConfig, ctx: Context, params, router, batch: Mapping[str, jax.Array], chosen=None
) -> tuple[Any, dict[str, Any], dict[str, dict[str, Routing]]]:
    """(gradients of params, metrics, routing) of cfg.gradient_accumulation micro-batches.

    With attention="indexer" they are those of the indexer's loss alone.

    Args:
      batch, chosen: as for `train_step`.
    """

    def objective(hidden, batch, share=None):
        loss, metrics = loss_of(hidden, batch, ctx, cfg.loss, share)
        return cfg.loss.index * metrics["index_kl"] if cfg.attention == "indexer" else loss, metrics

    def run(params, batch, chosen, sums=None):
        public, rows = dict(params) | {"router": router}, (batch["tokens"], batch.get("segment_ids"))
        return apply(cfg.model, public, *rows, ctx=ctx, chosen=chosen, sums=sums)

    def whole(params):
        hidden = run(params, batch, chosen)
        loss, metrics = objective(hidden, batch)
        return loss, (metrics, hidden.routing)

    if cfg.micro_batches == 1:
        grads, (metrics, routing) = jax.grad(whole, has_aux=True)(params)
        return grads, metrics, routing

    counts_all = counts_of(cfg.model, batch, cfg.loss)

    def add(total, part):
        """The sum of gradients so far with those of one micro-batch, added as they are found."""
        batch, chosen = part
        counts = counts_of(cfg.model, batch, cfg.loss)
        share = [n / jnp.maximum(n_all, 1) for n, n_all in zip(counts, counts_all, strict=True)]

        def summing(sums):
            hidden = run(params, batch, chosen, sums)
            loss, metrics = objective(hidden, batch, share)
            return (loss, hidden.sums), (metrics, hidden.routing)

        _, backward, results = jax.vjp(summing, zeros, has_aux=True)
        (total,) = backward((jnp.ones(()), total))
        return total, results

    zeros = _placed(cfg, ctx, jax.tree.map(jnp.zeros_like, params))
    count = cfg.micro_batches
    parts = (split_batch(ctx.rules, batch, count), _split_chosen(ctx.rules, chosen, count))
    grads, (metrics_M, routing_M) = jax.lax.scan(add, zeros, parts)
    metrics = {name: value_M.sum() for name, value_M in metrics_M.items()}
    return grads, metrics | captured(metrics), _of_all(routing_M)


def split_batch(rules: AxisRules, batch: Mapping[str, jax.Array], count: int):
    """The arrays [B,S] of a batch as micro-batches [M,B/M,S]; no row travels."""
    return {name: split_rows(rules, x_BS, count) for name, x_BS in batch.items()}


def _split_chosen(rules: AxisRules, chosen, count: int):
    """Experts chosen beforehand for each micro-batch; None stays None."""
    return jax.tree.map(lambda x: split_rows(rules, x, count, axis=x.ndim - 3), chosen)


def _placed(cfg: TrainConfig, ctx: Context, grads):
    """Gradients where their weights lie, so that what is summed is cut as they are."""
    axes = {name: tree for name, tree in param_axes(cfg.model).items() if name in grads}
    return jax.tree.map(lambda x, names: ctx.rules.constrain(x, *names), grads, axes)


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
