"""The plan of a training run, stage by stage, from its configuration: `v4jax train --dry-run`.

Next file to read: v4jax/train/stages.py.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

from sharding.mesh import parse_mesh
from sharding.rules import check_has_mesh, layout_for
from v4jax.planner.estimate import gigabytes, memory_of
from v4jax.planner.hardware import hardware_of
from v4jax.train.config import TrainConfig
from v4jax.train.stages import stage_at, starts
from v4jax.train.step import check_batch, schedule_of, sparse_mode


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One stage of a run.

    Attributes:
      first_step, last_step: counted from 1, both included.
      tokens, tokens_by_then: in the stage, and up to its end.
      learning_rate: of its first step, the largest, and of its last step.
      attention: as the stage's configuration names it.
      mtp: weight of the MTP loss.
      memory_bytes: of one device, estimated.
    """

    first_step: int
    last_step: int
    tokens: int
    tokens_by_then: int
    learning_rate: tuple[float, float, float]
    batch_size: int
    seq_len: int
    attention: str
    trains_indexer: bool
    mtp: float
    memory_bytes: float

    def row(self) -> tuple[str, ...]:
        """The stage as a line of a table for people."""
        first, peak, last = self.learning_rate
        return (
            f"{self.first_step} to {self.last_step}",
            f"{self.tokens:,}",
            f"{self.tokens_by_then:,}",
            f"{first:.2e} to {last:.2e}"
            + (f", peak {peak:.2e}" if peak > max(first, last) else ""),
            f"{self.batch_size} x {self.seq_len}",
            self.attention + (", learning indexer" if self.trains_indexer else ""),
            f"{self.mtp:g}",
            gigabytes(self.memory_bytes),
        )


HEAD = (
    "steps",
    "tokens",
    "by then",
    "learning rate",
    "batch",
    "attention",
    "MTP weight",
    "memory of a device",
)


def plan(cfg: TrainConfig) -> list[StagePlan]:
    """Every stage of `cfg`, checked as training would check it.

    Raises:
      ValueError: mesh, layout, batch or length do not fit one another.
    """
    check_has_mesh(cfg.layout, cfg.mesh)
    sizes = parse_mesh(cfg.mesh)
    rules, rate, hardware = layout_for(cfg.layout, sizes), schedule_of(cfg), hardware_of("cpu")
    stages, tokens = [], 0
    for start, stop in itertools.pairwise((*starts(cfg), cfg.steps)):
        view = stage_at(cfg, start)
        check_batch(view, rules, sizes)
        own = (stop - start) * view.batch_size * view.seq_len
        tokens += own
        # The schedule rises to the end of the warm-up and never after it.
        highest = min(max(start, cfg.warmup_steps), stop - 1)
        first, largest, last = (
            float(np.asarray(rate(step))) for step in (start, highest, stop - 1)
        )
        stages.append(
            StagePlan(
                start + 1,
                stop,
                own,
                tokens,
                (first, largest, last),
                view.batch_size,
                view.seq_len,
                view.attention,
                sparse_mode(view).train_indexer,
                view.loss.mtp,
                memory_of(view, hardware),
            )
        )
    return stages


def as_dict(cfg: TrainConfig) -> dict[str, Any]:
    """The plan as one JSON object."""
    stages = [dataclasses.asdict(stage) for stage in plan(cfg)]
    return {"run_dir": cfg.run_dir, "mesh": cfg.mesh, "layout": str(cfg.layout), "stages": stages}
