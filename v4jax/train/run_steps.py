"""The steps of a run, from where it begins to the last one or to a request to stop.

After each step: metrics, rollbacks, evaluation and checkpoints, as they are due.

Next file to read: v4jax/train/report.py.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from sharding.process_rows import from_rows, local_rows
from sharding.processes import stop_requests
from sharding.rules import AxisRules
from v4jax.checkpoint.store import Store
from v4jax.train.anticipate import RoutedBatchQueue, compile_choice
from v4jax.train.config import TrainConfig
from v4jax.train.evaluation import evaluator
from v4jax.train.finite import not_finite
from v4jax.train.goodput import Clock
from v4jax.train.objective import MEASURES
from v4jax.train.profile import Profiler
from v4jax.train.profile_table import parts_of, seconds_by_part
from v4jax.train.report import Reporter, Silent
from v4jax.train.resume import Begin, items_of
from v4jax.train.rollback import go_back
from v4jax.train.stability import LossHistory, remember, spike
from v4jax.train.stages import Batches, at_stage, number_at, stage_at, steps_left
from v4jax.train.step import Steps, TrainState, batch_sharding, compile_step
from v4jax.train.watch import plain


class Job(NamedTuple):
    """What stays the same from the first step to the last."""

    cfg: TrainConfig
    rules: AxisRules
    mesh: Mesh
    shardings: TrainState
    data: Batches
    held_out: dict[str, list]
    store: Store
    report: Reporter | Silent
    clock: Clock
    profiler: Profiler


class _Stage(NamedTuple):
    """What stays the same from the first step of a stage to its last."""

    number: int
    take_step: Steps
    queue: RoutedBatchQueue
    evaluate: Callable


class _Due(NamedTuple):
    """What to do after a step. `read`: wait for its metrics; all the others need that."""

    read: bool
    log: bool
    evaluate: bool
    save: bool
    last: bool


def run_steps(job: Job, begin: Begin) -> tuple[TrainState, int]:
    """(state, steps done) after training from `begin` to the last step, or to a request to stop."""
    cfg = job.cfg
    state, step, history, ahead, _ = begin
    stage, stop = None, False
    with stop_requests() as asked_to_stop:
        # A rollback sets `step` back but never the turn, so processes agree on a turn to end at.
        turn = begin.step
        while True:
            turn += 1
            if step == cfg.steps:
                return state, step
            if stage is None or stage.number != number_at(cfg, step):
                stage, ahead = _begin_stage(job, step, ahead), None
                history = at_stage(cfg, history, step)
            step += 1
            state, metrics, anticipated = _take_step(job, stage, state, step, history)
            # Several processes learn of a request at one turn only, and that turn may spike.
            stop = asked_to_stop(turn) or stop
            due = _due(job, step, stop, first=turn == begin.step + 1)
            if due.log and not due.save and job.store.needs_another():
                due = due._replace(save=True)
            _end_profile(job, stage, state, step)
            inside = metrics.pop("watch", None)
            if due.read:
                with job.clock.step(step):
                    metrics = {name: float(value) for name, value in metrics.items()}
            why = _fault(job, due, state, history, metrics)
            if why is not None:
                state, step, history = _go_back(job, stage, state, step, history, metrics, why)
                continue
            if due.read:
                history = remember(cfg.stability, history, metrics["loss"], metrics["grad_norm"])
            if due.log:
                told = _told(cfg, stage, anticipated) | job.clock.line()
                job.report.step(step, metrics | told)
            if inside is not None:
                job.report.inside(step, plain(jax.device_get(inside)))
            _evaluate_and_save(job, stage, due, step, state, history)
            if due.last:
                return state, step


def _begin_stage(job: Job, step: int, ahead: Mapping[str, Any] | None) -> _Stage:
    """What the steps after `step` run with.

    Args:
      ahead: batches that a checkpoint had drawn ahead (resume.Begin).
    """
    cfg, view = job.cfg, stage_at(job.cfg, step)
    place = batch_sharding(job.rules, job.mesh)
    compiled = functools.partial(compile_step, view, job.rules, job.shardings, job.mesh)
    choose = compile_choice(view, job.rules, job.shardings, job.mesh, job.clock.compiling)
    batches = job.clock.draws(job.data)
    queue = RoutedBatchQueue(
        batches, _putter(place, view), choose, cfg.stability.anticipate_lag, ahead
    )
    job.report.stage(step, view)
    # Evaluation keeps the batch size and length of the first stage.
    evaluate = evaluator(view, job.rules, _putter(place, cfg), job.clock.compiling)
    return _Stage(number_at(cfg, step), Steps(compiled, job.clock.compiling), queue, evaluate)


def _take_step(
    job: Job, stage: _Stage, state: TrainState, step: int, history: LossHistory
) -> tuple[TrainState, dict[str, Any], bool]:
    """(state, metrics, whether its experts were chosen ahead) of step number `step`."""
    cfg = job.cfg
    job.data.at(step - 1)
    left = steps_left(cfg, step - 1)
    watch = cfg.watch_every > 0 and step % cfg.watch_every == 0
    with job.profiler.step(step, state), job.clock.step(step):
        batch, chosen = stage.queue.next(state.public, step <= history.anticipate_until, left)
        state, metrics = stage.take_step(state, batch, chosen, watch=watch)
    job.clock.started(metrics["loss"])
    return state, metrics, chosen is not None


def _end_profile(job: Job, stage: _Stage, state: TrainState, step: int) -> None:
    """Ends a trace whose last step was number `step`, and shows the time of each part."""
    steps = job.profiler.done(state)
    if steps:
        parts = parts_of(stage.take_step.texts())
        folder = job.profiler.folder
        job.report.profile(step, folder, steps, seconds_by_part(folder, parts))


def _due(job: Job, step: int, stop: bool, first: bool) -> _Due:
    """What to do after step number `step`.

    Args:
      stop: whether the job is asked to end.
      first: whether this is the first step since the start.
    """
    cfg = job.cfg
    end = step == cfg.steps
    last = stop or end
    log = step % cfg.log_every == 0 or first or last
    evaluate = bool(job.held_out) and (step % cfg.eval_every == 0 or end)
    save = step % cfg.checkpoint_every == 0 or last
    read = log or evaluate or save or cfg.stability.rollbacks > 0
    return _Due(read, log, evaluate, save, last)


def _fault(
    job: Job, due: _Due, state: TrainState, history: LossHistory, metrics: Mapping[str, float]
) -> str | None:
    """Says why the run cannot go on after a step; None if it can, or its metrics are not read."""
    if not due.read:
        return None
    why = spike(job.cfg.stability, history, metrics["loss"], metrics["grad_norm"])
    if why is None and (due.save or due.evaluate):
        with job.clock.part("save"):
            why = not_finite(state)  # after the update: this is what would be saved
    return why


def _go_back(
    job: Job,
    stage: _Stage,
    state: TrainState,
    step: int,
    history: LossHistory,
    metrics: Mapping[str, float],
    why: str,
) -> tuple[TrainState, int, LossHistory]:
    """State, step and history to go on from, after a fault in step number `step`."""
    drawn = history.batch(step) + len(stage.queue)
    stage.queue.drop()
    job.clock.went_back(step)
    with job.clock.part("restore"):
        good = go_back(job.cfg, job.shardings, job.store, state, history, step, drawn, why)
    trace = (*history.losses, metrics["loss"])
    job.report.rollback(good.step, good.history, step, why, trace=trace)
    return good.state, good.step, good.history


def _told(cfg: TrainConfig, stage: _Stage, anticipated: bool) -> dict[str, float]:
    """What a line of metrics adds about the run's mode, for runs that have more than one."""
    told = {"anticipating": float(anticipated)} if cfg.stability.anticipate else {}
    return told | ({"stage": stage.number} if cfg.stages else {})


def _evaluate_and_save(
    job: Job, stage: _Stage, due: _Due, step: int, state: TrainState, history: LossHistory
) -> None:
    """Evaluates and saves as `due` says."""
    rank = None
    if due.evaluate:
        with job.clock.part("evaluation"):
            found = {
                f"{name}_{metric}": value
                for name, batches in job.held_out.items()
                for metric, value in stage.evaluate(state.public, batches).items()
            }
        measured = found[f"held_out_{MEASURES[job.cfg.objective]}"]
        rank = measured if math.isfinite(measured) else None  # NaN cannot be among the best
        job.report.evaluation(step, found)
    if due.save:
        with job.clock.step(step):
            jax.block_until_ready(state)
        items = items_of(state, history) | stage.queue.items() | {"data": job.data}
        with job.clock.part("save"):
            job.store.save(step, items, rank)
            if due.last and job.store.needs_another(wait=True):
                job.store.save(step, items, rank)


def _putter(place: NamedSharding, view: TrainConfig) -> Callable:
    """A function that makes a stage's global batch from this process's rows of it."""
    rows = local_rows(place, (view.batch_size, view.seq_len))

    def put(batch):
        return {
            name: from_rows(place, value, rows, view.batch_size) for name, value in batch.items()
        }

    return put
