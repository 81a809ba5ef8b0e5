"""What a run shows while it trains: a progress bar, metrics as JSON lines and in TensorBoard.

Next file to read: v4jax/train/metrics_file.py.
"""

import math
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sharding.mesh import make_mesh, parse_mesh
from v4jax.checkpoint.atomic import json_text, write_text
from v4jax.cost import train_flops_per_token
from v4jax.train.config import TrainConfig
from v4jax.train.goodput import MOST_DATA_WAIT
from v4jax.train.metrics_file import METRICS, JsonLines, read_metrics
from v4jax.train.objective import passes_of
from v4jax.train.profile_table import table
from v4jax.train.stability import LossHistory
from v4jax.train.trackers import TensorBoard, open_trackers


def matmul_rate(dtype: jnp.dtype, size: int = 2048, repeats: int = 3) -> float:
    """FLOP/s of a square matmul on all devices, measured now: the peak for model FLOPs utilisation.

    Simulated CPU devices share the machine's cores, so there one matmul already uses all of them.
    """
    # One device (the first process's), whatever mesh the caller runs on.
    with jax.set_mesh(make_mesh(parse_mesh(None))):
        a = jnp.ones((size, size), dtype)
        multiply = jax.jit(lambda a: a @ a)
        jax.block_until_ready(multiply(a))
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(multiply(a))
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best * (1 if jax.default_backend() == "cpu" else jax.device_count())


class Reporter:
    """Writes and shows the metrics of one run.

    A resumed run drops the lines after its checkpoint, so no step appears twice.
    """

    def __init__(self, run: pathlib.Path, cfg: TrainConfig, first: int, history: LossHistory):
        self._cfg, self._run = cfg, run
        self._trackers = open_trackers(cfg, run)
        self._open(first, history.rollbacks)
        self._tokens = self._flops = 0
        self._peak = matmul_rate(jnp.dtype(cfg.dtype))
        self._last = (first, None)
        self._console = Console()
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[line]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=cfg.steps, completed=first, line="compiling")

    def _open(self, step: int, rollbacks: int) -> None:
        """Opens the files for appending, after dropping what a resumed run does not keep.

        Lines after `step`, or after more than `rollbacks` rollbacks, go.
        """
        lines = [
            line
            for line in read_metrics(self._run)
            if line["step"] <= step and line.get("rollback", 0) <= rollbacks
        ]
        write_text(self._run / METRICS, "".join(json_text(line) + "\n" for line in lines))
        self._lines = JsonLines(self._run)
        self._board = TensorBoard(self._run, step + 1)

    def _close(self) -> None:
        self._board.close()
        self._lines.close()

    def __enter__(self) -> "Reporter":
        self._bar.start()
        return self

    def __exit__(self, *error) -> None:
        self._bar.stop()
        self._close()
        for tracker in self._trackers:
            tracker.close()

    def begin(self, step: int) -> None:
        """Shows what the run does first: the first step compiles for minutes without output."""
        if step == self._cfg.steps:
            self._show(step, "all steps are done; export, picture and sample are made again")
        else:
            self._show(step, "resumed; compiling" if step else "compiling")

    def stage(self, step: int, view: TrainConfig) -> None:
        """Tells that the steps after `step` run as `view` says.

        Compiling the first of them does not count as training time.
        """
        self._tokens = view.batch_size * view.seq_len
        self._flops = train_flops_per_token(view.model, view.seq_len) * self._tokens
        self._flops *= passes_of(view) / 3
        self._last = (step, None)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Adds speed and utilisation to a step's metrics, writes them and shows them."""
        now = time.perf_counter()
        before, since = self._last
        self._last = (step, now)
        if since is not None:
            seconds = (now - since) / (step - before)
            metrics["tokens_per_second"] = self._tokens / seconds
            metrics["model_flops_utilisation"] = self._flops / seconds / self._peak
        line = f"loss {metrics['loss']:.3f}"
        if since is not None:
            line += (
                f"  {metrics['tokens_per_second']:,.0f} tok/s"
                f"  MFU {metrics['model_flops_utilisation']:.0%}"
            )
        line += f"  load {metrics['expert_load_max']:.1f}x" + _data_warning(metrics)
        self._write(step, metrics)
        self._show(step, line)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Writes and shows held-out losses."""
        self._write(step, metrics)
        self._show(step, "  ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
        self._last = (step, time.perf_counter())  # do not count evaluation as training time

    def inside(self, step: int, found: dict[str, dict[str, Any]]) -> None:
        """Writes measurements inside the model (v4jax/train/watch.py) as one line.

        TensorBoard and trackers get only the extremes over layers.
        """
        self._lines.write(step, {"inside": found})
        scalars = {}
        for name, values in found["layers"].items():
            finite = [value for value in values if value is not None]
            for word, extreme in (("least", min), ("most", max)) if finite else ():
                scalars[f"layers/{name}/{word}"] = extreme(finite)
        for kind in ("grad_rms", "update_rms"):
            for group, value in found[kind].items():
                scalars[f"{kind}/{group}"] = math.nan if value is None else value
        for writer in (self._board, *self._trackers):
            writer.write(step, scalars)

    def rollback(
        self, step: int, history: LossHistory, at: int, why: str, trace: Sequence[float]
    ) -> None:
        """Tells that the run went back from step `at` to `step`, and for what reason.

        Writes one line with the losses of the steps given up, which are the last of `trace`.
        """
        self._close()
        self._open(step, history.rollbacks)
        given_up = list(trace[-(at - step) :])
        said: dict[str, Any] = {"rollback": history.rollbacks, "at": at, "why": why}
        said |= {"skipped": history.skipped[-1], "losses_given_up": given_up}
        self.event(step, "rollback", **said)
        self._board.text(step, "rollback", f"step {at}: {why}; back to step {step}")
        self._last = (step, None)
        first, last = history.skipped[-1]
        self._show(
            step,
            f"rollback {history.rollbacks}: step {at}: {why}; batches {first} to {last} skipped",
        )

    def profile(
        self, step: int, folder: pathlib.Path, steps: int, seconds: dict[str, float]
    ) -> None:
        """Shows how long each part of the model took in a trace that ended with step `step`.

        Args:
          folder: of the trace.
          steps: that were traced.
          seconds: of each part (profile_table.seconds_by_part).
        """
        self.event(step, "profile", steps=steps, folder=str(folder), seconds=seconds)
        self._last = (step, None)
        self._show(step, f"a trace of {steps} step(s) is in {folder}")
        self._console.print("\n".join(table(seconds, steps)), highlight=False)

    def event(self, step: int, name: str, **said: Any) -> None:
        """Writes something that happened to the run before the step after `step`."""
        self._lines.write(step, {"event": name} | said)

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        for writer in (self._lines, self._board, *self._trackers):
            writer.write(step, metrics)

    def _show(self, step: int, line: str) -> None:
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, line=line)
        else:
            print(f"step {step}/{self._cfg.steps}  {line}", flush=True)

    @staticmethod
    def last(run: pathlib.Path) -> dict[str, Any]:
        """The newest value of each metric in the run's file."""
        newest: dict[str, Any] = {}
        for line in read_metrics(run):
            newest |= {} if "event" in line or "inside" in line else line
        return newest


def _data_warning(metrics: dict[str, float]) -> str:
    """What a line of metrics adds where steps wait for their data; "" where they hardly do."""
    wait = metrics.get("data_wait", 0.0)
    if wait <= MOST_DATA_WAIT:
        return ""
    return f"  WARNING: {wait:.0%} of step time is data wait (above {MOST_DATA_WAIT:.0%})"


class Silent:
    """A reporter that shows nothing, for every process of a job but the first."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *error) -> None:
        pass

    def begin(self, step: int) -> None:
        pass

    def stage(self, step: int, view: TrainConfig) -> None:
        pass

    def step(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def inside(self, step: int, found: dict[str, dict[str, Any]]) -> None:
        pass

    def rollback(
        self, step: int, history: LossHistory, at: int, why: str, trace: Sequence[float]
    ) -> None:
        pass

    def profile(
        self, step: int, folder: pathlib.Path, steps: int, seconds: dict[str, float]
    ) -> None:
        pass

    def event(self, step: int, name: str, **said: Any) -> None:
        pass
