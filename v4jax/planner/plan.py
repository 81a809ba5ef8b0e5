"""The plan of a training run, stage by stage, from its configuration: `v4jax train --dry-run`.

Next file to read: v4jax/train/stages.py.
"""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from sharding.mesh import parse_mesh
from sharding.rules import check_has_mesh, layout_for
from v4jax.planner.estimate import USABLE, Estimate, estimate, gigabytes, memory_of
from v4jax.planner.hardware import Hardware, hardware_of, target_of
from v4jax.planner.micro_batches import chosen_micro_batches
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
      micro_batches: parts of the batch that run one after the other.
      step: the estimate of a step on the chips that were asked for; None without.
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
    micro_batches: int
    step: Estimate | None

    def row(self) -> tuple[str, ...]:
        """The stage as a line of a table for people."""
        first, peak, last = self.learning_rate
        steps = f"{self.first_step} to {self.last_step}"
        parts = f" in {self.micro_batches} parts" if self.micro_batches > 1 else ""
        batch = f"{self.batch_size} x {self.seq_len}{parts}"
        memory = gigabytes(self.memory_bytes)
        if self.step is not None:
            return (steps, batch, self.attention, memory, *_speed(self.step))
        above = f", peak {peak:.2e}" if peak > max(first, last) else ""
        return (
            steps,
            f"{self.tokens:,}",
            f"{self.tokens_by_then:,}",
            f"{first:.2e} to {last:.2e}{above}",
            batch,
            self.attention + (", learning indexer" if self.trains_indexer else ""),
            f"{self.mtp:g}",
            memory,
        )


def head(target: str | None) -> tuple[str, ...]:
    """The head of the table that StagePlan.row fills."""
    if target is not None:
        return ("steps", "batch", "attention", "memory", f"a step on {target}", "speed")
    return (
        "steps",
        "tokens",
        "by then",
        "learning rate",
        "batch",
        "attention",
        "MTP weight",
        "memory of a device",
    )


def plan(cfg: TrainConfig, target: str | None = None) -> list[StagePlan]:
    """Every stage of `cfg`, checked as training would check it.

    Args:
      target: chips, as target_of reads them, for which each stage's step is estimated too.

    Raises:
      ValueError: mesh, layout, batch or length do not fit one another, or gradient_accumulation
        "auto" without a target, or one that the mesh does not have the devices of.
    """
    check_has_mesh(cfg.layout, cfg.mesh)
    sizes = parse_mesh(cfg.mesh)
    hardware, cfg = _with_target(cfg, target, math.prod(sizes.values()))
    rules, rate = layout_for(cfg.layout, sizes), schedule_of(cfg)
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
                view.micro_batches,
                None if target is None else estimate(view, hardware),
            )
        )
    return stages


def _speed(step: Estimate) -> tuple[str, str]:
    """What a row says of a step: its time and what binds it, its MFU and tokens a second."""
    missing = "" if step.fits else f"; does not fit {gigabytes(step.hbm)}"
    return (
        f"{step.step_seconds:.3g} s, {step.bound}{missing}",
        f"MFU {step.mfu:.1%}, {step.tokens_per_second:,.0f} tokens/s",
    )


def _with_target(
    cfg: TrainConfig, target: str | None, devices: int
) -> tuple[Hardware, TrainConfig]:
    """(the target's profile, `cfg` with a number of micro-batches)."""
    if target is None:
        if cfg.gradient_accumulation == "auto":
            raise ValueError(
                "gradient_accumulation: got auto; a plan needs --target to know the memory"
            )
        return hardware_of("cpu"), cfg
    found = target_of(target, devices)
    if found.devices != devices:
        raise ValueError(
            f"target: {target} has {found.devices} devices; the mesh {cfg.mesh or '(one device)'} "
            f"has {devices}"
        )
    has = USABLE * found.hardware.of_a_device(devices).hbm_bytes
    return found.hardware, chosen_micro_batches(cfg, has, found.hardware)


def as_dict(cfg: TrainConfig, target: str | None = None) -> dict[str, Any]:
    """The plan as one JSON object."""
    stages = [
        dataclasses.asdict(stage) | {"step": None if stage.step is None else stage.step.to_dict()}
        for stage in plan(cfg, target)
    ]
    return {"run_dir": cfg.run_dir, "mesh": cfg.mesh, "layout": str(cfg.layout), "stages": stages}
