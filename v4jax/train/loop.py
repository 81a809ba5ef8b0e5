"""The training run: check everything, start or resume, step, report, save; at the end plot and export.

Order of start-up: abstract parameters -> shardings -> state created (or restored) in place -> one compiled step.

Of several processes each runs all of this and loads the rows its own devices hold; only the first writes and prints.
What they do together they must do in one order: steps, evaluation, checkpoints, export.

Next file to read: v4jax/train/report.py.
"""

import functools
import itertools
import math
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding.mesh import make_mesh, parse_mesh
from sharding.processes import (
    anywhere,
    check_whole,
    from_rows,
    is_first,
    local_rows,
    stop_requests,
    wait_for_all,
)
from sharding.rules import AxisRules, check_has_mesh, layout_for
from v4jax.checkpoint.export import carried_files, kinds_for, save_safetensors
from v4jax.checkpoint.store import Store, check_config, is_run, write_config
from v4jax.data.config import tokenizer_of
from v4jax.data.listing import Listings
from v4jax.data.store import prepare_cache
from v4jax.data.summary import unread_lines, unused_lines
from v4jax.model.weights import SparseMode
from v4jax.stderr import say
from v4jax.storage import folder_to_fill
from v4jax.tokenizer import disagreement
from v4jax.train.anticipate import RoutedBatchQueue, compile_choice
from v4jax.train.config import TrainConfig
from v4jax.train.data import held_out_sets, train_batches, unigram_loss
from v4jax.train.finite import not_finite
from v4jax.train.loss import loss_and_routing, targets
from v4jax.train.report import Reporter, Silent, plot_losses, require_plots
from v4jax.train.resume import check_data, check_source, fresh, go_back, items_of, start
from v4jax.train.stability import LossHistory, remember, spike
from v4jax.train.stages import Batches, at_stage, number_at, stage_at, starts, steps_left
from v4jax.train.step import Steps, batch_sharding, check_batch, compile_step, state_shardings
from v4jax.train.watch import plain

UNIGRAM_BATCHES = 64
"""Training batches that the unigram model is counted from."""


def train(cfg: TrainConfig) -> dict[str, Any]:
    """Runs or resumes `cfg` to its last step and returns a summary: paths, losses, speed ({} but on the first process).

    SIGTERM, as before a machine is taken away, ends it after the step under way with a checkpoint; the summary then says
    `stopped_at`, and the same call goes on from there.

    Raises:
      ValueError: anything wrong with config, mesh, data or run directory, before training starts.
      TrainingFailed: the loss or the state is not finite, or the loss spikes, and no rollback is
        left. Such a state is neither saved nor exported.
      OSError: a checkpoint could not be written; those before it are intact.
    """
    check_has_mesh(cfg.layout, cfg.mesh)
    run = _check_folders(cfg)
    sizes = parse_mesh(cfg.mesh)
    rules = layout_for(cfg.layout, sizes) if math.prod(sizes.values()) > 1 else AxisRules()
    mesh = make_mesh(sizes)
    check_whole(mesh)
    require_plots()
    for done in starts(cfg):
        check_batch(stage_at(cfg, done), rules, sizes)
    if cfg.export != "none":
        kinds_for(cfg.model, cfg.export)
    tokenizer = tokenizer_of(cfg.data)
    say(disagreement(cfg.model, tokenizer))
    listings = Listings()
    check_data(cfg, tokenizer, listings)
    say(*unread_lines(cfg.data, listings))
    with jax.set_mesh(mesh):
        shardings = state_shardings(cfg, rules, mesh)
        place = batch_sharding(rules, mesh)
        rows = local_rows(place, (cfg.batch_size, cfg.seq_len))
        _cache(cfg, tokenizer, listings)
        data = Batches(
            cfg,
            lambda view: _data(
                view, tokenizer, listings, local_rows(place, (view.batch_size, view.seq_len))
            ),
        )
        held_out = _held_out(cfg, tokenizer, listings, rows)
        # What a later stage cannot read is said now, not in the middle of the run.
        for done in starts(cfg)[1:]:
            view = stage_at(cfg, done)
            _data(view, tokenizer, listings, local_rows(place, (view.batch_size, view.seq_len)))
        _say_unused(cfg, tokenizer, listings)
        # Before anything is written: weights that are refused leave no run behind.
        unsaved = None if anywhere(is_run(run)) else fresh(cfg, shardings)
        _prepare(run, cfg, tokenizer)
        with Store(run, cfg.keep, cfg.keep_every, cfg.keep_best, writes=True) as store:
            begin = start(cfg, rules, shardings, store, data, unsaved)
            with _reporter(run, cfg, begin.step, begin.history) as report:
                if begin.changed:
                    report.event(begin.step, "data changed", changed=begin.changed)
                put = functools.partial(_put, place, rows, cfg.batch_size)
                state, last = _steps(
                    cfg, rules, mesh, shardings, begin, data, held_out, put, store, report
                )
        if last < cfg.steps:
            return (
                {"run_dir": str(run), "steps": cfg.steps, "stopped_at": last} if is_first() else {}
            )
        return _finish(cfg, run, tokenizer, listings, state)


def _check_folders(cfg: TrainConfig) -> pathlib.Path:
    """The run directory, after checks of all folders but those of the text; makes none.

    Raises:
      ValueError: a folder that cannot be made, or a run or first weights of another model.
    """
    run = folder_to_fill(cfg.run_dir, "run_dir")
    if cfg.data.cache:
        folder_to_fill(cfg.data.cache, "cache")
    check_config(run, cfg.model)
    if cfg.init_from and not (run / "config.json").exists():
        check_source(cfg)
    return run


def _cache(cfg: TrainConfig, tokenizer, listings: Listings) -> None:
    """The token cache, made by one process before the others look for it (one on another disk makes its own)."""
    if cfg.data.cache:
        if is_first():
            prepare_cache(cfg.data, tokenizer, listings)
        wait_for_all("the token cache is there")


def _data(cfg: TrainConfig, tokenizer, listings: Listings, rows: list[int] | None):
    return train_batches(
        cfg.data,
        tokenizer,
        cfg.seq_len,
        cfg.batch_size,
        vocab_size=cfg.model.vocab_size,
        rows=rows,
        listings=listings,
    )


def _held_out(cfg: TrainConfig, tokenizer, listings: Listings, rows: list[int] | None) -> dict:
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


def _say_unused(cfg: TrainConfig, tokenizer, listings: Listings) -> None:
    """A line on stderr for each source with records that are not used: how many, and why."""
    seq_lens = [stage_at(cfg, done).seq_len for done in starts(cfg)]
    held_seq_len = cfg.seq_len if cfg.eval_batches else None
    say(*unused_lines(cfg.data, tokenizer, seq_lens, held_seq_len, listings))


def _prepare(run: pathlib.Path, cfg: TrainConfig, tokenizer) -> None:
    """The run directory, written by one process after all have found that it may be."""
    source = "" if (run / "config.json").exists() else cfg.init_from
    wait_for_all("the run directory is checked")
    if is_first():
        write_config(run, cfg.model, source)
        for path in carried_files(source) if source else ():
            shutil.copyfile(path, run / path.name)
        tokenizer.save(run)
    wait_for_all("the run directory is there")


def _reporter(
    run: pathlib.Path, cfg: TrainConfig, first: int, history: LossHistory
) -> Reporter | Silent:
    return Reporter(run, cfg, first, history) if is_first() else Silent()


def _steps(cfg, rules, mesh, shardings, begin, data, held_out, put, store: Store, report):
    """(state, step it stands at): trains from `begin` (see resume.start) to the last step, or until the job is asked to end."""
    state, step, history, ahead, _ = begin
    first, stop, stage, place = step, False, None, batch_sharding(rules, mesh)
    with stop_requests() as asked_to_stop:
        for turn in itertools.count(
            first + 1
        ):  # goes on where a rollback sets `step` back: processes agree on a turn to end at
            if step == cfg.steps:
                return state, step
            if stage != number_at(cfg, step):
                stage, view = number_at(cfg, step), stage_at(cfg, step)
                take_step = Steps(functools.partial(compile_step, view, rules, shardings, mesh))
                choose = compile_choice(view, rules, shardings, mesh)
                queue, ahead = (
                    RoutedBatchQueue(
                        data, _putter(place, view), choose, cfg.stability.anticipate_lag, ahead
                    ),
                    None,
                )
                evaluate, history = _evaluator(view, rules, put), at_stage(cfg, history, step)
                report.stage(step, view)
            data.at(step)
            step += 1
            batch, chosen = queue.next(
                state.public, step <= history.anticipate_until, steps_left(cfg, step - 1)
            )
            state, metrics = take_step(
                state, batch, chosen, watch=cfg.watch_every > 0 and step % cfg.watch_every == 0
            )
            inside = metrics.pop("watch", None)
            stop = (
                asked_to_stop(turn) or stop
            )  # several processes are asked at one turn, which may be that of a spike
            last = stop or step == cfg.steps
            log = step % cfg.log_every == 0 or turn == first + 1 or last
            save = step % cfg.checkpoint_every == 0 or last
            evaluates = bool(held_out) and (step % cfg.eval_every == 0 or step == cfg.steps)
            if log or save or evaluates or cfg.stability.rollbacks:
                metrics = {name: float(value) for name, value in metrics.items()}
                seen = metrics["loss"], metrics["grad_norm"]
                why = spike(cfg.stability, history, *seen)
                if why is None and (save or evaluates):
                    why = not_finite(state)  # as the update has left it, and as it would be kept
                if why is not None:
                    at, before, drawn = step, history, history.batch(step) + len(queue)
                    queue.drop()
                    state, step, history, *_ = go_back(
                        cfg, shardings, store, state, before, at, drawn, why
                    )
                    report.rollback(step, history, at, why, trace=(*before.losses, seen[0]))
                    continue
                history = remember(cfg.stability, history, *seen)
            if log:
                now = (
                    {"anticipating": float(chosen is not None)} if cfg.stability.anticipate else {}
                )
                report.step(step, metrics | now | ({"stage": stage} if cfg.stages else {}))
            if inside is not None:
                report.inside(step, plain(jax.device_get(inside)))
            held_out_nll = None
            if evaluates:
                nll = {
                    f"{name}_nll": evaluate(state.public, batches)
                    for name, batches in held_out.items()
                }
                if math.isfinite(nll["held_out_nll"]):  # NaN has no place in the order of the best
                    held_out_nll = nll["held_out_nll"]
                report.evaluation(step, nll)
            if save:
                jax.block_until_ready(state)
                store.save(
                    step, items_of(state, history) | queue.items() | {"data": data}, held_out_nll
                )
            if last:
                return state, step


def _putter(place, view: TrainConfig):
    """What puts the batches of a stage on the mesh."""
    return functools.partial(
        _put, place, local_rows(place, (view.batch_size, view.seq_len)), view.batch_size
    )


def _put(place, rows: list[int], count: int, batch):
    """This process's rows of a batch -> the global batch on its devices."""
    return {name: from_rows(place, value, rows, count) for name, value in batch.items()}


def _evaluator(cfg: TrainConfig, rules: AxisRules, put):
    @jax.jit
    def nll(params, batch):
        _, (metrics, _) = loss_and_routing(
            cfg.model,
            params,
            batch,
            rules=rules,
            dtype=jnp.dtype(cfg.dtype),
            quant=cfg.quant,
            sparse=SparseMode(cfg.attention != "sparse"),
        )
        return metrics["nll"], targets(batch, 1)[1].sum()

    def evaluate(params, batches: Iterable) -> float:
        """Mean nats per token over all batches."""
        # One at a time: on CPU two independent programs of several processes must not overlap (sharding/processes.py).
        pairs = [jax.block_until_ready(nll(params, put(batch))) for batch in batches]
        counts = np.array([float(count) for _, count in pairs])
        return float(np.dot(counts, [float(value) for value, _ in pairs]) / counts.sum())

    return evaluate


def _finish(
    cfg: TrainConfig, run: pathlib.Path, tokenizer, listings: Listings, state
) -> dict[str, Any]:
    """Export and picture; both can be made again from the checkpoint."""
    summary: dict[str, Any] = {"run_dir": str(run), "steps": cfg.steps}
    if cfg.export != "none":
        target = run / "export"
        save_safetensors(
            cfg.model, state.public, target, dtype=cfg.export, overwrite=True, source=run
        )
        summary["export"] = str(target)
    if not is_first():
        return {}
    if cfg.export != "none":
        tokenizer.save(target)
    if held_out := _held_out(cfg, tokenizer, listings, None):
        train_rows = itertools.islice(_data(cfg, tokenizer, listings, None), UNIGRAM_BATCHES)
        summary["unigram_nll"] = unigram_loss(
            train_rows, held_out["held_out"], cfg.model.vocab_size
        )
    summary["picture"] = str(plot_losses(run, summary.get("unigram_nll")))
    return summary | Reporter.last(run)
