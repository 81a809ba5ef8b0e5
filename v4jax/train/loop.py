"""The training run: check everything, start or resume, step, report, save; at the end plot and export.

Order of start-up: abstract parameters -> shardings -> state created (or restored) in place -> one compiled step.

Of several processes each runs all of this and loads the rows its own devices hold; only the first writes and prints.
What they do together they must do in one order: steps, evaluation, checkpoints, export.

Next file to read: v4jax/checkpoint/store.py.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding.mesh import make_mesh, parse_mesh
from sharding.processes import check_whole, from_rows, is_first, local_rows, stop_requests, wait_for_all
from sharding.rules import AxisRules, layout_for
from v4jax.api import load_onto
from v4jax.checkpoint.export import kinds_for, save_safetensors
from v4jax.checkpoint.store import Store, check_config, check_same_arrays, write_config
from v4jax.config import ModelConfig
from v4jax.cost import train_flops_per_token
from v4jax.data.config import tokenizer_of
from v4jax.train.config import TrainConfig
from v4jax.train.data import held_out_batches, train_batches, unigram_loss
from v4jax.train.loss import loss_and_routing
from v4jax.train.report import Reporter, Silent, plot_losses, require_plots
from v4jax.train.step import TrainState, batch_sharding, check_batch, compile_step, init_state, state_from, state_shardings

UNIGRAM_BATCHES = 64
"""Training batches that the unigram model is counted from."""


class TrainingFailed(RuntimeError):
    """The run cannot go on (a loss that is not finite). The last checkpoint is intact."""


def train(cfg: TrainConfig) -> dict[str, Any]:
    """Runs or resumes `cfg` to its last step and returns a summary: paths, losses, speed ({} but on the first process).

    SIGTERM, as before a machine is taken away, ends it after the step under way with a checkpoint; the summary then says
    `stopped_at`, and the same call goes on from there.

    Raises:
      ValueError: anything wrong with config, mesh, data or run directory, before training starts.
      TrainingFailed: the loss is not finite.
      OSError: a checkpoint could not be written; those before it are intact.
    """
    sizes = parse_mesh(cfg.mesh)
    rules = layout_for(cfg.layout, sizes) if math.prod(sizes.values()) > 1 else AxisRules()
    mesh = make_mesh(sizes)
    check_whole(mesh)
    require_plots()
    check_batch(cfg, rules, sizes)
    if cfg.export != "none":
        kinds_for(cfg.model, cfg.export)
    run = pathlib.Path(cfg.run_dir)
    tokenizer = tokenizer_of(cfg.data)
    with jax.set_mesh(mesh):
        shardings = state_shardings(cfg, rules, mesh)
        place = batch_sharding(rules, mesh)
        rows = local_rows(place, (cfg.batch_size, cfg.seq_len))
        data = _data(cfg, tokenizer, rows)
        held_out = _held_out(cfg, tokenizer, rows)
        _prepare(run, cfg, tokenizer)
        with Store(run, cfg.keep, cfg.keep_every, cfg.keep_best, writes=True) as store:
            state, first = _start(cfg, shardings, store, data)
            with _reporter(run, cfg, first) as report:
                put = functools.partial(_put, place, rows, cfg.batch_size)
                state, last = _steps(cfg, rules, mesh, shardings, state, first, data, held_out, put, store, report)
        if last < cfg.steps:
            return {"run_dir": str(run), "steps": cfg.steps, "stopped_at": last} if is_first() else {}
        return _finish(cfg, run, tokenizer, state)


def _data(cfg: TrainConfig, tokenizer, rows: list[int] | None):
    return train_batches(cfg.data, tokenizer, cfg.seq_len, cfg.batch_size, vocab_size=cfg.model.vocab_size, rows=rows)


def _held_out(cfg: TrainConfig, tokenizer, rows: list[int] | None) -> list:
    if cfg.eval_batches == 0:
        return []
    return held_out_batches(
        cfg.data, tokenizer, cfg.seq_len, cfg.batch_size, vocab_size=cfg.model.vocab_size, rows=rows,
        max_batches=cfg.eval_batches,
    )  # fmt: skip


def _prepare(run: pathlib.Path, cfg: TrainConfig, tokenizer) -> None:
    """The run directory, written by one process after all have found that it may be."""
    check_config(run, cfg.model)
    wait_for_all("the run directory is checked")
    if is_first():
        write_config(run, cfg.model)
        tokenizer.save(run)
    wait_for_all("the run directory is there")


def _reporter(run: pathlib.Path, cfg: TrainConfig, first: int) -> Reporter | Silent:
    return Reporter(run, cfg, first, train_flops_per_token(cfg.model, cfg.seq_len)) if is_first() else Silent()


def _start(cfg: TrainConfig, shardings, store: Store, data):
    """(state, steps already done): the newest intact checkpoint with the data iterator set to its place, or a fresh state."""
    step = store.latest_intact(strict=cfg.strict)
    if step is None:
        return (_from_weights(cfg, shardings) if cfg.init_from else init_state(cfg, shardings)), 0
    store.put_aside_after(step)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(functools.partial(init_state, cfg, shardings)),
        shardings,
    )
    if step > cfg.steps:
        raise ValueError(f"steps: got {cfg.steps}; {cfg.run_dir} has already done {step}")
    check_same_arrays(store.path(step), abstract.public)
    items = store.load(step, {"params": abstract.public, "optimizer": abstract.optimizer, "data": data})
    router = items["params"].pop("router")
    count = jax.make_array_from_callback((), shardings.step, lambda _: np.asarray(step, np.int32))
    return dataclasses.replace(
        abstract, params=items["params"], router=router, optimizer=items["optimizer"], step=count
    ), step


def _from_weights(cfg: TrainConfig, shardings) -> TrainState:
    """A state whose weights and router tables are those of `cfg.init_from`; everything else is fresh.

    Raises:
      ValueError: no checkpoint, or one of another model (names the first field that differs).
    """
    found = ModelConfig.from_json(cfg.init_from).to_dict()
    for name, ours in cfg.model.to_dict().items():
        if found.get(name) != ours:
            raise ValueError(f"init_from: {cfg.init_from} is another model: {name} is {found.get(name)} there, {ours} here")
    params = load_onto(cfg.init_from, cfg.model, "float32", shardings.public)
    return jax.jit(functools.partial(state_from, cfg), out_shardings=shardings, donate_argnums=0)(params)


def _steps(cfg, rules, mesh, shardings, state, first, data, held_out, put, store: Store, report):
    """(state, step it stands at): trains to the last step, or until the job is asked to end."""
    step_function = compile_step(cfg, rules, shardings, mesh)
    evaluate = _evaluator(cfg, rules, put)
    with stop_requests() as asked_to_stop:
        for step in range(first + 1, cfg.steps + 1):
            batch = put(next(data))
            if step == first + 1:  # gloo's reduce-scatter gives up when a process comes more than 30 s late: compile first
                step_function = step_function.lower(jax.block_until_ready(state), batch).compile()
                wait_for_all("the step is compiled")
            state, metrics = step_function(state, batch)
            last = asked_to_stop(step) or step == cfg.steps
            log = step % cfg.log_every == 0 or step == first + 1 or last
            save = step % cfg.checkpoint_every == 0 or last
            if log or save:  # a state that is not finite is never saved
                metrics = {name: float(value) for name, value in metrics.items()}
                for name in ("loss", "grad_norm"):
                    if not math.isfinite(metrics[name]):
                        raise TrainingFailed(f"step {step}: {name} is {metrics[name]}; last checkpoint: {store.latest}")
            if log:
                report.step(step, metrics)
            held_out_nll = None
            if held_out and (step % cfg.eval_every == 0 or step == cfg.steps):
                held_out_nll = evaluate(state.public, held_out)
                report.evaluation(step, {"held_out_nll": held_out_nll})
            if save:
                jax.block_until_ready(state)
                store.save(step, {"params": state.public, "optimizer": state.optimizer, "data": data}, held_out_nll)
            if last:
                return state, step
    return state, first


def _put(place, rows: list[int], count: int, batch):
    """This process's rows of a batch -> the global batch on its devices."""
    return {name: from_rows(place, value, rows, count) for name, value in batch.items()}


def _evaluator(cfg: TrainConfig, rules: AxisRules, put):
    @jax.jit
    def nll(params, batch):
        _, (metrics, _) = loss_and_routing(cfg.model, params, batch, rules=rules, dtype=jnp.dtype(cfg.dtype), quant=cfg.quant)
        same = (batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]) & (batch["segment_ids"][:, 1:] > 0)
        return metrics["nll"], same.sum()

    def evaluate(params, batches: Iterable) -> float:
        """Mean nats per token over all batches."""
        # One at a time: on CPU two independent programs of several processes must not overlap (sharding/processes.py).
        pairs = [jax.block_until_ready(nll(params, put(batch))) for batch in batches]
        counts = np.array([float(count) for _, count in pairs])
        return float(np.dot(counts, [float(value) for value, _ in pairs]) / counts.sum())

    return evaluate


def _finish(cfg: TrainConfig, run: pathlib.Path, tokenizer, state) -> dict[str, Any]:
    """Export and picture; both can be made again from the checkpoint."""
    summary: dict[str, Any] = {"run_dir": str(run), "steps": cfg.steps}
    if cfg.export != "none":
        target = run / "export"
        save_safetensors(cfg.model, state.public, target, dtype=cfg.export, overwrite=True)
        summary["export"] = str(target)
    if not is_first():
        return {}
    if cfg.export != "none":
        tokenizer.save(target)
    if held_out := _held_out(cfg, tokenizer, None):
        train_rows = itertools.islice(_data(cfg, tokenizer, None), UNIGRAM_BATCHES)
        summary["unigram_nll"] = unigram_loss(train_rows, held_out, cfg.model.vocab_size)
    summary["picture"] = str(plot_losses(run, summary.get("unigram_nll")))
    return summary | Reporter.last(run)
