"""Where the wall time of a run goes: one clock, and at any moment one part that it counts for.

    compile     building programs; of those that are neither step nor evaluation, without tracing
    data_wait   devices have nothing to do because the next batch is not there yet
    step        steps that bring the run further
    rollback    steps that repeat numbers which the run had done before it went back
    evaluation  held-out losses
    save        the part of saving that steps wait for, with the check of what is saved
    restore     loading a checkpoint, at the start or after a loss spike
    other       all the rest: checks, reading data sets, first weights, reports

Goodput is the share of `step`. Each call of `train` has its own clock, also where it resumes a run.

Next file to read: v4jax/train/rollback.py.
"""

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Iterator

import jax

from v4jax.train.stages import Batches

PARTS = ("compile", "data_wait", "step", "rollback", "evaluation", "save", "restore", "other")
COMPILED = "/jax/core/compile/backend_compile_duration"
"""What JAX calls the time of compiling a program."""
MOST_DATA_WAIT = 0.05
"""A larger share of a step spent waiting for data is worth a warning."""


class Clock:
    """Seconds of wall time by part, since the clock was made. One thread uses it."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._part = "other"
        self._since = time.perf_counter()
        self._furthest = 0
        self._at_line: dict[str, float] | None = None
        self._waiter = concurrent.futures.ThreadPoolExecutor(1, "step-end")
        self._step_end: concurrent.futures.Future[float] | None = None
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._compiled)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time of the block for the part `name`, except that of blocks inside it."""
        before = self._turn_to(name)
        try:
            yield
        finally:
            self._turn_to(before)

    def compiling(self) -> contextlib.AbstractContextManager[None]:
        """`part("compile")`, as CompiledTogether (v4jax/train/programs.py) takes it."""
        return self.part("compile")

    def step(self, number: int) -> contextlib.AbstractContextManager[None]:
        """Counts the block for step number `number`: as lost if the run has been there before."""
        return self.part("rollback" if number <= self._furthest else "step")

    def went_back(self, at: int) -> None:
        """Notes that the run has gone back from step number `at`."""
        self._furthest = max(self._furthest, at)

    def started(self, result: jax.Array) -> None:
        """Notes a result of the step that has just been started; devices are busy until then."""
        self._step_end = self._waiter.submit(_moment_of, result)

    def draws(self, batches: Iterator | Batches) -> Iterator:
        """The same batches. Drawing one counts as waiting only while devices are idle."""
        while True:
            with self.part("data_wait"):
                start = self._since
                batch = next(batches)
            self._move_overlap(start)
            yield batch

    def seconds(self) -> dict[str, float]:
        """Seconds of each part so far; their sum is the time since the clock was made."""
        self._turn_to(self._part)
        return dict(self._seconds)

    def metrics(self) -> dict[str, float]:
        """Seconds of each part, such as `seconds_step`, and `goodput`, the share of `step`."""
        seconds = self.seconds()
        named = {f"seconds_{name}": value for name, value in seconds.items()}
        return named | {"goodput": seconds["step"] / sum(seconds.values())}

    def line(self) -> dict[str, float]:
        """`metrics`, and `data_wait`: its share of the step time since the last line.

        The first line lacks that share: the first batch comes while its reader starts.
        """
        now, before = self.seconds(), self._at_line
        self._at_line = now
        found = self.metrics()
        if before is None:
            return found
        wait, *work = (now[name] - before[name] for name in ("data_wait", "step", "rollback"))
        return found | {"data_wait": wait / (wait + sum(work))}

    def close(self) -> None:
        """Ends the thread that waits for steps, and listens to JAX no longer."""
        jax.monitoring.unregister_event_duration_listener(self._compiled)
        self._waiter.shutdown(wait=False, cancel_futures=True)

    def _turn_to(self, name: str) -> str:
        """Counts the time up to now, and from now on for `name`; the part before."""
        now = time.perf_counter()
        self._seconds[self._part] += now - self._since
        before, self._part, self._since = self._part, name, now
        return before

    def _compiled(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        """Moves the time in which JAX has compiled or read a program out of the part around."""
        here = threading.get_ident() == self._thread
        if event == COMPILED and here and self._part != "compile":
            self._seconds[self._part] -= duration_secs
            self._seconds["compile"] += duration_secs

    def _move_overlap(self, start: float) -> None:
        """Moves the time of a draw, from `start` on, while a step ran to the part around it."""
        if self._step_end is None:
            return
        drawn = self._since - start
        busy = self._step_end.result() - start if self._step_end.done() else drawn
        overlap = min(max(busy, 0.0), drawn)
        self._seconds["data_wait"] -= overlap
        self._seconds[self._part] += overlap


def _moment_of(result: jax.Array) -> float:
    """The time at which a result is there."""
    # A step that fails shows its error where the run reads its results.
    with contextlib.suppress(Exception):
        jax.block_until_ready(result)
    return time.perf_counter()
