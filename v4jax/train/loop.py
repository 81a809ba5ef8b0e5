"""The training run: checks, starts or resumes, steps, reports, saves; at the end plots and exports.

Start-up goes: abstract parameters -> shardings -> state created or restored in place -> one
compiled step.

In a job of several processes, each runs all of this and loads the rows of its own devices; only the
first writes and prints. All must do their joint work in the same order: steps, evaluation,
checkpoints, export.

Next file to read: v4jax/train/run_steps.py.
"""

import contextlib
import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from sharding.agreement import agreed
from sharding.processes import is_first
from v4jax.adapters.base import ADAPTER, read_base
from v4jax.adapters.files import save_adapter
from v4jax.checkpoint.export import save_safetensors
from v4jax.checkpoint.store import Store, newest_step
from v4jax.data.listing import Listings
from v4jax.parameter_tree import ADAPTERS
from v4jax.storage import Claim, Place, Spool
from v4jax.train.adapters import check_base
from v4jax.train.compile_cache import compile_cache
from v4jax.train.config import TrainConfig
from v4jax.train.data import unigram_loss
from v4jax.train.evaluation import evaluation_sets
from v4jax.train.goodput import Clock
from v4jax.train.initial import first_state
from v4jax.train.metrics_file import METRICS, plot_losses
from v4jax.train.prepare import (
    Layout,
    as_read,
    check_folders,
    check_layout,
    check_text,
    make_cache,
    open_batches,
    say_unused,
    stage_batches,
    still_ours,
    with_chat_release,
    write_run,
)
from v4jax.train.profile import Profiler, check_ahead
from v4jax.train.report import Reporter, Silent
from v4jax.train.resume import start
from v4jax.train.run_steps import Job, run_steps
from v4jax.train.step import batch_sharding, state_shardings
from v4jax.train.trackers import IDS

UNIGRAM_BATCHES = 64
"""Training batches whose tokens the unigram model counts."""


def train(cfg: TrainConfig) -> dict[str, Any]:
    """Runs or resumes `cfg` to its last step and returns a summary of paths and metrics.

    Only the first process gets the summary; the others get {}. On SIGTERM, which comes before a
    machine is taken away, the run finishes its step, saves a checkpoint and ends. The summary then
    has `stopped_at`, and the same call resumes from there.

    Raises:
      ValueError: anything wrong with config, mesh, data or run directory, before training starts;
        every process raises it.
      TrainingFailed: the loss or the state is not finite, or the loss spikes, and no rollback is
        left. Such a state is neither saved nor exported.
      OSError: a checkpoint could not be written; those before it are intact.
    """
    with contextlib.closing(Clock()) as clock, compile_cache(cfg.compile_cache):
        summary = _train(as_read(cfg), clock)
        return summary | clock.metrics() if summary else {}


def _train(cfg: TrainConfig, clock: Clock) -> dict[str, Any]:
    """`train`, without the figures of the clock in the summary: the checks that take no time."""
    with agreed():
        layout = check_layout(cfg)
        run = check_folders(cfg)
        cfg = with_chat_release(cfg, run)
    claim = Claim(run)
    with contextlib.ExitStack() as stack:
        with agreed():
            claim.require_free()
            if is_first():
                stack.enter_context(claim.announced())
        return _run(cfg, clock, layout, run, claim)


def _run(
    cfg: TrainConfig, clock: Clock, layout: Layout, run: Place, claim: Claim
) -> dict[str, Any]:
    """The rest of `_train`, once layout and run directory fit and nobody else writes there."""
    rules, mesh = layout
    newest = newest_step(run)
    with agreed():
        check_ahead(cfg, run, newest or 0)
    with agreed():
        base = check_base(cfg, run, newest)
    listings = Listings()
    tokenizer = check_text(cfg, newest, listings)
    spooling = Spool(run, (METRICS, IDS), is_first(), claim.holds)
    with jax.set_mesh(mesh), spooling as spool:
        shardings = state_shardings(cfg, rules, mesh)
        make_cache(cfg, tokenizer, listings)
        data, held_out = open_batches(cfg, tokenizer, batch_sharding(rules, mesh), listings)
        say_unused(cfg, tokenizer, listings)
        first = first_state(cfg, shardings, newest)
        write_run(run, cfg, tokenizer, claim, newest, base)
        kept = cfg.keep, cfg.keep_every, cfg.keep_best

        def before_save() -> Callable[[], Any]:
            still_ours(claim)
            return spool.send_soon()

        with Store(run, *kept, writes=True, before_save=before_save) as store:
            with clock.part("other" if newest is None else "restore"):
                begin = start(cfg, rules, shardings, store, data, first)
                store.remove_leftovers()
            reporter = functools.partial(Reporter, spool.folder, cfg, begin.step, begin.history)
            profiling = Profiler(spool.folder, cfg)
            with reporter() if is_first() else Silent() as report, profiling as profiler:
                report.begin(begin.step)
                if begin.changed:
                    report.event(begin.step, "data changed", changed=begin.changed)
                tools = store, report, clock, profiler
                job = Job(cfg, rules, mesh, shardings, data, held_out, *tools)
                state, last = run_steps(job, begin)
                with clock.part("save"):
                    store.wait()
        still_ours(claim)
        if last == cfg.steps:
            return _finish(cfg, run, spool.folder, tokenizer, listings, state)
    return {"run_dir": str(run), "steps": cfg.steps, "stopped_at": last} if is_first() else {}


def _finish(
    cfg: TrainConfig, run: Place, folder: pathlib.Path, tokenizer, listings: Listings, state
) -> dict[str, Any]:
    """Exports the weights, plots the losses and returns the summary.

    A checkpoint is enough to do both again.

    Args:
      folder: of the metrics (storage/spool.py).
    """
    summary: dict[str, Any] = {"run_dir": str(run), "steps": cfg.steps}
    exports = cfg.export != "none" and cfg.lora is None
    if cfg.export != "none" and cfg.lora is not None:
        target = run / ADAPTER
        base = read_base(run)
        save_adapter(cfg.model, state.params[ADAPTERS], target, cfg.lora, base)
        summary["adapter"] = str(target)
    if exports:
        target = run / "export"
        save_safetensors(
            cfg.model, state.public, target, dtype=cfg.export, overwrite=True, source=run
        )
        summary["export"] = str(target)
    if not is_first():
        return {}
    if exports:
        tokenizer.save(target)
    held_out = evaluation_sets(cfg, tokenizer, None, listings)
    if held_out and cfg.objective == "next_token":
        rows = stage_batches(cfg, tokenizer, None, listings)
        train_rows = itertools.islice(rows, UNIGRAM_BATCHES)
        summary["unigram_nll"] = unigram_loss(
            train_rows, held_out["held_out"], cfg.model.vocab_size
        )
    picture = plot_losses(folder, summary.get("unigram_nll"))
    summary["picture"] = str(run / picture.name)
    return summary | Reporter.last(folder)
