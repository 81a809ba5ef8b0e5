"""A trace of some steps of a run (`--profile FIRST:COUNT`), and the time of each part in it.

The trace is JAX's own (XProf, Perfetto). An operation belongs to the part in whose named scope it
was written; backward passes and recomputed layers belong to the part whose gradient they give.

Next file to read: v4jax/train/profile_table.py.
"""

import contextlib
import pathlib
import re

import jax

from sharding.processes import is_first
from v4jax import storage
from v4jax.stderr import say
from v4jax.storage import Place

PROFILE = "profile"
"""The folder of the trace in the run's directory."""


def profiled_steps(text: str, steps: int) -> range:
    """The numbers of the steps that `text`, FIRST:COUNT, names; none for "".

    Example: profiled_steps("10:3", 20) is range(10, 13).

    Raises:
      ValueError: it is not two integers of at least 1, or goes beyond the run's `steps`.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r"([0-9]{1,18}):([0-9]{1,18})", text)
    first, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if first < 1 or count < 1:
        raise ValueError(
            f"profile: got {text!r}; must be FIRST:COUNT, two integers of at least 1, such as 10:3"
        )
    if first + count - 1 > steps:
        raise ValueError(f"profile: got {text!r}; must end within steps={steps}")
    return range(first, first + count)


def check_ahead(cfg, run: Place, done: int) -> None:
    """Refuses steps to profile that a run which resumes after `done` steps will not do.

    A run that has profiled them before it was stopped goes on, and stderr says so.

    Args:
      cfg: TrainConfig of the run.
      run: its directory.

    Raises:
      ValueError: names the first step that can be profiled.
    """
    wanted = profiled_steps(cfg.profile, cfg.steps)
    if not wanted or wanted[0] > done:
        return
    if any(name.endswith(".xplane.pb") for name in storage.listing(run / PROFILE)):
        say(f"profile: step {wanted[0]} is done, and its trace is in {run / PROFILE}")
        return
    raise ValueError(
        f"profile: got {cfg.profile!r}; {run} resumes after step {done}, so the first step to "
        f"profile must be {done + 1} or later"
    )


class Profiler:
    """Traces the steps that a run's configuration names, on the devices of the first process.

    At the end of the context a trace that still runs ends too.

    Attributes:
      folder: where the traces go.
    """

    def __init__(self, run: pathlib.Path, cfg):
        """Takes the run's directory and its TrainConfig."""
        self.folder = run / PROFILE
        self._wanted = profiled_steps(cfg.profile if is_first() else "", cfg.steps)
        self._left = 0

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *error) -> None:
        if self._left:
            self._left = 0
            jax.profiler.stop_trace()

    def step(self, number: int, state) -> contextlib.AbstractContextManager:
        """The context in which step `number` is started; begins the trace before the first one.

        state: what the step starts from; the trace begins once it is there.
        """
        if self._wanted and number == self._wanted.start and not self._left:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Python's calls would be most of the file
            jax.profiler.start_trace(self.folder, profiler_options=options)
            self._left = len(self._wanted)
        if not self._left:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def done(self, state) -> int:
        """Ends the trace after its last step; the number of its steps, or 0 if none has ended.

        state: what the step has made; the trace ends once it is there.
        """
        if not self._left:
            return 0
        self._left -= 1
        if self._left:
            return 0
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        count, self._wanted = len(self._wanted), range(0)
        return count
