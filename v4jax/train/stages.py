"""The stages of a run: what changes after how many steps, and the batches of whichever stage a step belongs to.

A stage changes fields of the configuration and nothing else: weights, optimizer state, router bias and step go on. Where the
shape of a batch changes, reading goes on in another stream of the same documents, with a shuffle of its own: every step's
batch follows from the configuration alone, but a document may be met again. All other changes go on in the same stream.

Example: TrainConfig(batch_size=8, seq_len=4096, steps=900, stages=(Stage(after=100, batch_size=32), Stage(after=500, attention="sparse")))
has three stages and two streams; step 101 is the first of the second one.

Next file to read: v4jax/train/config.py.
"""

import dataclasses
import math
from collections.abc import Awaitable, Callable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What changes when `after` steps are done; None: stays as it is."""

    after: int
    """Steps done when the stage begins: above the stage before, below the run's steps."""
    batch_size: int | None = None
    """Rows a step from then on; None: unchanged."""
    seq_len: int | None = None
    """Tokens a row from then on; None: unchanged."""
    attention: str | None = None
    """sparse, dense or indexer from then on; None: unchanged."""
    mtp: float | None = None
    """Weight of the MTP loss from then on; None: unchanged."""


def check_stages(cfg) -> None:
    """Raises ValueError for stages out of order or out of the run, or one whose own fields do not fit."""
    before = 0
    for i, stage in enumerate(cfg.stages):
        if not before < stage.after < cfg.steps:
            raise ValueError(
                f"stages[{i}].after: got {stage.after}; must be above {before} and below steps={cfg.steps}"
            )
        before = stage.after
        try:
            stage_at(cfg, stage.after)
        except ValueError as error:
            raise ValueError(f"stages[{i}]: {error}") from None


def starts(cfg) -> tuple[int, ...]:
    """Steps done when a stage begins, ascending, 0 first."""
    return 0, *(stage.after for stage in cfg.stages)


def number_at(cfg, done: int) -> int:
    """Which stage, counted from 0, the step after `done` steps belongs to."""
    return sum(start <= done for start in starts(cfg)) - 1


def steps_left(cfg, done: int) -> float:
    """Steps of the stage that the step after `done` steps belongs to, from that step on; inf for the last stage, which a longer run goes on with."""
    return min((start for start in starts(cfg) if start > done), default=math.inf) - done


def stage_at(cfg, done: int):
    """The configuration without stages that holds for the step after `done` steps; itself for a run without stages."""
    changes: dict[str, Any] = {}
    weights = cfg.loss
    for stage in cfg.stages[: number_at(cfg, done)]:
        fields = {name: getattr(stage, name) for name in ("batch_size", "seq_len", "attention")}
        changes |= {name: value for name, value in fields.items() if value is not None}
        weights = weights if stage.mtp is None else dataclasses.replace(weights, mtp=stage.mtp)
    return dataclasses.replace(cfg, stages=(), loss=weights, **changes) if cfg.stages else cfg


def stream_at(cfg, done: int) -> int:
    """Which stream of batches the step after `done` steps reads: how often their shape has changed."""
    shapes = [
        (view.batch_size, view.seq_len)
        for view in (stage_at(cfg, start) for start in starts(cfg) if start <= done)
    ]
    return sum(a != b for a, b in zip(shapes, shapes[1:], strict=False))


def at_stage(cfg, history, done: int):
    """The run's loss history where a later stage begins: losses and gradients of the stage before tell nothing of this one's."""
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
    """The batches of a run, stage by stage. Orbax saves and loads every stream read so far; `at` says which one is in use.

    A checkpoint's directory has the position of the stream in use, and below `stream-N/` those of the others: the run comes back
    to an earlier one only after a spike, and must not meet again what it has drawn from the later one.
    """

    def __init__(self, cfg, read: Callable[[Any], Iterator]):
        """`read`: configuration of a stage -> its endless batches, which can be saved and loaded."""
        self._cfg, self._read, self._streams = cfg, read, {}
        self.at(0)

    def at(self, done: int) -> "Batches":
        """Turns to the stream of the step after `done` steps; one that was read before goes on where it stopped."""
        self._now = stream_at(self._cfg, done)
        if self._now not in self._streams:
            self._streams[self._now] = self._read(stream_view(self._cfg, done))
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """What the stream in use depends on (v4jax/data/identity.py)."""
        return self._streams[self._now].get_state()["settings"]

    def __next__(self):
        return next(self._streams[self._now])

    async def save(self, directory) -> Awaitable[None]:
        """Writes the positions as they are now; in the background."""
        writing = [
            await stream.save(directory if number == self._now else _Below(directory, number))
            for number, stream in self._streams.items()
        ]

        async def write():
            for one in writing:
                await one

        return write()

    async def load(self, directory) -> Awaitable[None]:
        """Sets the positions of the stream in use and of all others that were saved."""
        now, reading = self._now, [await self._streams[self._now].load(directory)]
        for done in starts(self._cfg):
            number = stream_at(self._cfg, done)
            if number != now and (directory / _below(number)).is_dir():
                self.at(done)
                reading.append(await self._streams[number].load(directory / _below(number)))
        self._now = now

        async def read():
            for one in reading:
                await one

        return read()


class _Below:
    """A directory below one that Orbax is about to create, for one stream."""

    def __init__(self, directory, number: int):
        self._directory, self._name = directory, _below(number)

    async def await_creation(self):
        path = await self._directory.await_creation() / self._name
        path.mkdir(exist_ok=True)  # of several processes each comes here
        return path


def _below(number: int) -> str:
    return f"stream-{number}"
