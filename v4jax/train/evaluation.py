"""The objective on sets that are never trained on: one mean over all tokens (or pairs) of a set.

Axes: M micro-batches.
Next file to read: v4jax/train/loop.py.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from sharding.rules import AxisRules
from v4jax.context import Context, SparseMode
from v4jax.data.listing import Listings
from v4jax.data.rows import Batch
from v4jax.functional import apply
from v4jax.kernels.choice import kernels_from
from v4jax.train.config import TrainConfig
from v4jax.train.data import held_out_sets
from v4jax.train.gradients import split_batch
from v4jax.train.objective import frozen_models, terms_of
from v4jax.train.programs import CompiledTogether, Compiling


def evaluation_sets(
    cfg: TrainConfig, tokenizer, rows: list[int] | None, listings: Listings | None = None
) -> dict[str, list[Batch]]:
    """The batches to evaluate on, by name; {} for a run without evaluation.

    Args:
      rows: the rows of each batch that this process holds; None: all.
    """
    if cfg.eval_batches == 0:
        return {}
    return held_out_sets(
        cfg.data,
        tokenizer,
        cfg.seq_len,
        cfg.batch_size,
        vocab_size=cfg.model.vocab_size,
        rows=rows,
        max_batches=cfg.eval_batches,
        listings=listings,
    )


def evaluator(
    cfg: TrainConfig, rules: AxisRules, put: Callable, compiling: Compiling = contextlib.nullcontext
) -> Callable:
    """The function (public params, batches) -> metrics of the objective's main term, by name.

    Those of next_token are {"nll": mean nats per token}.

    Args:
      put: places a batch on the mesh.
      compiling: as for CompiledTogether (v4jax/train/programs.py).
    """

    ctx = Context(
        rules=rules,
        dtype=cfg.dtype,
        quant=cfg.quant,
        sparse=SparseMode(dense=cfg.attention != "sparse"),
        kernels=kernels_from(cfg.kernels),
    )

    def of_rows(params, batch):
        """(metrics, how much they are means over)."""
        frozen = frozen_models(cfg, ctx, params, batch)
        _, term = terms_of(cfg, frozen)[0]
        hidden = apply(cfg.model, params, batch["tokens"], batch.get("segment_ids"), ctx=ctx)
        return term.mean(hidden, batch, ctx)[1], term.count(cfg.model, batch)

    @jax.jit
    def of_batch(params, batch):
        count = cfg.micro_batches
        if count == 1:
            return of_rows(params, batch)
        parts = split_batch(rules, batch, count)
        metrics_M, counts_M = jax.lax.map(functools.partial(of_rows, params), parts)
        total = counts_M.sum()
        share_M = counts_M / jnp.maximum(total, 1)
        return {name: jnp.sum(x_M * share_M) for name, x_M in metrics_M.items()}, total

    compiled = CompiledTogether(of_batch, compiling)

    def evaluate(params, batches: Iterable[Batch]) -> dict[str, float]:
        # One at a time: on CPU two independent programs of several processes must not overlap
        # (sharding/processes.py).
        found = [jax.block_until_ready(compiled(params, put(batch))) for batch in batches]
        counts = np.array([float(count) for _, count in found])
        values = {name: [float(metrics[name]) for metrics, _ in found] for name in found[0][0]}
        return {name: float(np.dot(counts, x) / counts.sum()) for name, x in values.items()}

    return evaluate
