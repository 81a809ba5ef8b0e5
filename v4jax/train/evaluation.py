"""The loss on sets that are never trained on: one mean over all predicted tokens of a set.

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
from v4jax.kernels.choice import kernels_from
from v4jax.train.config import TrainConfig
from v4jax.train.data import held_out_sets
from v4jax.train.gradients import split_batch
from v4jax.train.loss import loss_and_routing
from v4jax.train.losses.next_token import targets
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
    """The function (public params, batches) -> mean nats per token.

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

    def rows_nll(params, batch):
        _, (metrics, _) = loss_and_routing(cfg.model, params, batch, ctx)
        return metrics["nll"], targets(batch, 1)[1].sum()

    @jax.jit
    def nll(params, batch):
        count = cfg.micro_batches
        if count == 1:
            return rows_nll(params, batch)
        parts = split_batch(rules, batch, count)
        nll_M, counts_M = jax.lax.map(functools.partial(rows_nll, params), parts)
        return jnp.sum(nll_M * counts_M) / jnp.maximum(counts_M.sum(), 1), counts_M.sum()

    compiled = CompiledTogether(nll, compiling)

    def evaluate(params, batches: Iterable[Batch]) -> float:
        # One at a time: on CPU two independent programs of several processes must not overlap
        # (sharding/processes.py).
        pairs = [jax.block_until_ready(compiled(params, put(batch))) for batch in batches]
        counts = np.array([float(count) for _, count in pairs])
        return float(np.dot(counts, [float(value) for value, _ in pairs]) / counts.sum())

    return evaluate
