"""The stages of a run: what changes after how many steps, and the batches of each stage.

A stage changes only fields of the configuration: weights, optimizer state, router bias and step go
on. If the shape of a batch changes, reading moves to another stream of the same documents with its
own shuffle. So every step's batch follows from the configuration alone, but a document may come
again. Any other change stays in the same stream.

Example: TrainConfig(batch_size=8, seq_len=4096, steps=900, stages=(
    Stage(after=100, batch_size=32), Stage(after=500, attention="sparse")))
has three stages and two streams; step 101 is the first of the second stream.

Next file to read: v4jax/train/config.py.
"""

import dataclasses
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What changes once `after` steps are done; None leaves a field unchanged."""

    after: int
    """Steps done when the stage begins: above the stage before, below the run's steps."""
    batch_size: int | None = None
    """Rows a step from then on; None: unchanged."""
    gradient_accumulation: int | None = None
    """Micro-batches a step from then on; None: unchanged."""
    seq_len: int | None = None
    """Tokens a row from then on; None: unchanged."""
    attention: str | None = None
    """sparse, dense or indexer from then on; None: unchanged."""
    mtp: float | None = None
    """Weight of the MTP loss from then on; None: unchanged."""


def check_stages(cfg) -> None:
    """Checks that the stages are in order, within the run, and each a valid configuration.

    Raises:
      ValueError: names the stage, the value and the rule.
    """
    before = 0
    for i, stage in enumerate(cfg.stages):
        if not before < stage.after < cfg.steps:
            raise ValueError(
                f"stages[{i}].after: got {stage.after}; must be above {before} "
                f"and below steps={cfg.steps}"
            )
        before = stage.after
        try:
            stage_at(cfg, stage.after)
        except ValueError as error:
            raise ValueError(f"stages[{i}]: {error}") from None


def starts(cfg) -> tuple[int, ...]:
    """Steps done at the beginning of each stage, ascending, 0 first."""
    return 0, *(stage.after for stage in cfg.stages)


def number_at(cfg, done: int) -> int:
    """The number, from 0, of the stage to which the step after `done` steps belongs."""
    return sum(start <= done for start in starts(cfg)) - 1


def steps_left(cfg, done: int) -> float:
    """How many steps the stage still has after `done` steps.

    The last stage has inf, since a longer run goes on with it.
    """
    return min((start for start in starts(cfg) if start > done), default=math.inf) - done


def stage_at(cfg, done: int):
    """The configuration, without stages, of the step after `done` steps.

    A run without stages gets its own configuration.
    """
    changes: dict[str, Any] = {}
    weights = cfg.loss
    for stage in cfg.stages[: number_at(cfg, done)]:
        names = ("batch_size", "gradient_accumulation", "seq_len", "attention")
        fields = {name: getattr(stage, name) for name in names}
        changes |= {name: value for name, value in fields.items() if value is not None}
        weights = weights if stage.mtp is None else dataclasses.replace(weights, mtp=stage.mtp)
    return dataclasses.replace(cfg, stages=(), loss=weights, **changes) if cfg.stages else cfg


def stream_at(cfg, done: int) -> int:
    """The number of the stream that the step after `done` steps reads.

    It counts how often the shape of a batch has changed.
    """
    shapes = [
        (view.batch_size, view.seq_len)
        for view in (stage_at(cfg, start) for start in starts(cfg) if start <= done)
    ]
    return sum(a != b for a, b in zip(shapes, shapes[1:], strict=False))


def at_stage(cfg, history, done: int):
    """The run's loss history; without its losses and gradient norms where a later stage begins.

    Those of one stage say nothing about the next.
    """
    return (
        dataclasses.replace(history, losses=(), grad_norms=())
        if done in starts(cfg)[1:]
        else history
    )


def stream_view(cfg, done: int):
    """`stage_at`, with the seed of the stream that the step after `done` steps reads."""
    view = stage_at(cfg, done)
    seed = (view.data.seed + stream_at(cfg, done)) % 2**32
    return dataclasses.replace(view, data=dataclasses.replace(view.data, seed=seed))


class Batches:
    """The batches of a run, stage by stage; Orbax saves and loads every stream read so far.

    `at` says which stream is in use. A checkpoint's directory has the position of the stream in
    use, and below `stream-N/` those of the others. A run returns to an earlier stream only after a
    spike, and must then not repeat what it has drawn from the later one.
    """

    def __init__(self, cfg, read: Callable[[Any], Iterator]):
        """Starts with the stream of the first stage.

        Args:
          read: configuration of a stage -> its endless batches, which can be saved and loaded.
        """
        self._cfg, self._read, self._streams = cfg, read, {}
        self._skipped: frozenset[int] = frozenset()
        self.at(0)

    def at(self, done: int) -> "Batches":
        """Turns to the stream of the step after `done` steps.

        A stream that was read before goes on where it stopped.
        """
        self._now = stream_at(self._cfg, done)
        if self._now not in self._streams:
            self._streams[self._now] = self._read(stream_view(self._cfg, done))
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """What the stream in use depends on (v4jax/data/identity.py)."""
        return self.position["settings"]

    @property
    def position(self) -> dict[str, Any]:
        """Settings and rows of the stream in use (v4jax/data/rows.py)."""
        return self._streams[self._now].get_state()

    def skip(self, numbers: Iterable[int]) -> None:
        """Makes `load` leave these streams at their beginning, whatever position was saved."""
        self._skipped = frozenset(numbers)

    def __next__(self):
        return next(self._streams[self._now])

    async def save(self, directory) -> Awaitable[None]:
        """Writes the current positions, in the background."""
        writing = [
            await stream.save(directory if number == self._now else _Below(directory, number))
            for number, stream in self._streams.items()
        ]

        async def write():
            for one in writing:
                await one

        return write()

    async def load(self, directory) -> Awaitable[None]:
        """Sets the positions of the stream in use and of all others that were saved (`skip`)."""
        now, reading = self._now, [await self._streams[self._now].load(directory)]
        for number, done, path in saved_streams(self._cfg, directory, now):
            if number not in self._skipped:
                self.at(done)
                reading.append(await self._streams[number].load(path))
        self._now = now

        async def read():
            for one in reading:
                await one

        return read()


class _Below:
    """A directory for one stream, below one that Orbax is about to create."""

    def __init__(self, directory, number: int):
        self._directory, self._name = directory, _below(number)

    async def await_creation(self):
        path = await self._directory.await_creation() / self._name
        path.mkdir(exist_ok=True)  # each process comes here
        return path


def saved_streams(cfg, directory, now: int) -> list[tuple[int, int, Any]]:
    """(number, steps done when it begins, folder of its position) of each stream that a checkpoint
    has beside `now`, the one in use.

    directory: the checkpoint's item of data positions.
    """
    first = {stream_at(cfg, done): done for done in reversed(starts(cfg))}
    places = [(number, done, directory / _below(number)) for number, done in sorted(first.items())]
    return [place for place in places if place[0] != now and place[2].is_dir()]


def _below(number: int) -> str:
    return f"stream-{number}"
