"""The training run: check everything, start or resume, step, report, save; at the end plot, export and sample.

Order of start-up: abstract parameters -> shardings -> state created (or restored) in place -> one compiled step.

Next file to read: v4jax/checkpoint/store.py.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import AxisRules, layout_for
from v4jax.checkpoint.export import save_safetensors
from v4jax.checkpoint.store import Store, check_same_arrays, write_config
from v4jax.cost import train_flops_per_token
from v4jax.train.config import TrainConfig
from v4jax.train.data import held_out_batches, tokenizer_of, train_batches, unigram_loss
from v4jax.train.loss import loss_and_routing
from v4jax.train.report import Reporter, plot_losses, require_plots
from v4jax.train.step import batch_sharding, compile_step, init_state, state_shardings


class TrainingFailed(RuntimeError):
    """The run cannot go on (a loss that is not finite). The last checkpoint is intact."""


def train(cfg: TrainConfig) -> dict[str, Any]:
    """Runs or resumes `cfg` to its last step and returns a summary (paths, losses, speed).

    Raises:
      ValueError: anything wrong with config, mesh, data or run directory, before training starts.
      TrainingFailed: the loss is not finite.
    """
    sizes = parse_mesh(cfg.mesh)
    rules = layout_for(cfg.layout, sizes) if math.prod(sizes.values()) > 1 else AxisRules()
    mesh = make_mesh(sizes)
    _check(cfg, rules, sizes)
    run = pathlib.Path(cfg.run_dir)
    tokenizer = tokenizer_of(cfg.data)
    with jax.set_mesh(mesh):
        shardings = state_shardings(cfg, rules, mesh)
        data = _data(cfg, tokenizer)
        held_out = _held_out(cfg, tokenizer)
        write_config(run, cfg.model)
        tokenizer.save(run)
        with Store(run, cfg.keep, writes=True) as store:
            state, first = _start(cfg, shardings, store, data)
            with Reporter(run, cfg, first, train_flops_per_token(cfg.model, cfg.seq_len)) as report:
                state = _steps(cfg, rules, mesh, shardings, state, first, data, held_out, store, report)
        return _finish(cfg, rules, run, tokenizer, state, held_out)


def _check(cfg: TrainConfig, rules: AxisRules, sizes: dict[str, int]) -> None:
    require_plots()
    parts = math.prod(sizes[axis] for axis in rules.mesh_axes("act_batch"))
    if cfg.batch_size % parts:
        axes = " x ".join(f"{axis}={sizes[axis]}" for axis in rules.mesh_axes("act_batch"))
        raise ValueError(f"batch_size: got {cfg.batch_size}; must divide by the mesh axes that split it, {axes} = {parts}")


def _data(cfg: TrainConfig, tokenizer):
    return train_batches(
        cfg.data, tokenizer, cfg.seq_len, cfg.batch_size, vocab_size=cfg.model.vocab_size,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip


def _held_out(cfg: TrainConfig, tokenizer) -> list:
    if cfg.eval_batches == 0:
        return []
    return held_out_batches(
        cfg.data, tokenizer, cfg.seq_len, cfg.batch_size, vocab_size=cfg.model.vocab_size,
        process_index=jax.process_index(), process_count=jax.process_count(), max_batches=cfg.eval_batches,
    )  # fmt: skip


def _start(cfg: TrainConfig, shardings, store: Store, data):
    """(state, steps already done): a fresh state, or the newest checkpoint with the data iterator set to its place."""
    step = store.latest
    if step is None:
        return init_state(cfg, shardings), 0
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
    count = jax.device_put(jnp.asarray(step, jnp.int32), shardings.step)
    return dataclasses.replace(
        abstract, params=items["params"], router=router, optimizer=items["optimizer"], step=count
    ), step


def _steps(cfg, rules, mesh, shardings, state, first, data, held_out, store: Store, report):
    place = batch_sharding(rules, mesh)
    step_function = compile_step(cfg, rules, shardings, mesh)
    evaluate = _evaluator(cfg, rules, place)
    for step in range(first + 1, cfg.steps + 1):
        batch = _put(next(data), place)
        state, metrics = step_function(state, batch)
        log = step % cfg.log_every == 0 or step in (first + 1, cfg.steps)
        save = step % cfg.checkpoint_every == 0 or step == cfg.steps
        if log or save:  # a state that is not finite is never saved
            metrics = {name: float(value) for name, value in metrics.items()}
            for name in ("loss", "grad_norm"):
                if not math.isfinite(metrics[name]):
                    raise TrainingFailed(f"step {step}: {name} is {metrics[name]}; last checkpoint: {store.latest}")
        if log:
            report.step(step, metrics)
        if held_out and (step % cfg.eval_every == 0 or step == cfg.steps):
            report.evaluation(step, {"held_out_nll": evaluate(state.public, held_out)})
        if save:
            store.save(step, {"params": state.public, "optimizer": state.optimizer, "data": data})
    return state


def _put(batch, place):
    return {name: jax.make_array_from_process_local_data(place, value) for name, value in batch.items()}


def _evaluator(cfg: TrainConfig, rules: AxisRules, place):
    @jax.jit
    def nll(params, batch):
        _, (metrics, _) = loss_and_routing(cfg.model, params, batch, rules=rules, dtype=jnp.dtype(cfg.dtype))
        same = (batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]) & (batch["segment_ids"][:, 1:] > 0)
        return metrics["nll"], same.sum()

    def evaluate(params, batches: Iterable) -> float:
        """Mean nats per token over all batches."""
        pairs = [nll(params, _put(batch, place)) for batch in batches]
        counts = np.array([float(count) for _, count in pairs])
        return float(np.dot(counts, [float(value) for value, _ in pairs]) / counts.sum())

    return evaluate


def _finish(cfg: TrainConfig, rules, run: pathlib.Path, tokenizer, state, held_out) -> dict[str, Any]:
    """Picture, export, sample; everything can be made again from the checkpoint."""
    summary: dict[str, Any] = {"run_dir": str(run), "steps": cfg.steps}
    if held_out:
        summary["unigram_nll"] = unigram_loss(_first_batches(cfg, tokenizer), held_out, cfg.model.vocab_size)
    summary["picture"] = str(plot_losses(run, summary.get("unigram_nll")))
    summary |= Reporter.last(run)
    if cfg.export != "none":
        target = run / "export"
        save_safetensors(cfg.model, state.public, target, dtype=cfg.export, overwrite=True)
        tokenizer.save(target)
        summary["export"] = str(target)
    if cfg.sample_tokens:
        from v4jax.generate.plain import generate

        prompt = [tokenizer.bos_token_id] + tokenizer.encode(cfg.sample_prompt)
        ids = generate(
            cfg.model, state.public, prompt, cfg.sample_tokens, temperature=0.7, seed=cfg.seed, rules=rules,
            dtype=jnp.dtype(cfg.dtype),
        )  # fmt: skip
        summary["sample"] = cfg.sample_prompt + tokenizer.decode(ids)
        (run / "sample.txt").write_text(summary["sample"])
    return summary


def _first_batches(cfg: TrainConfig, tokenizer, count: int = 64):
    batches = _data(cfg, tokenizer)
    return (next(batches) for _ in range(count))
