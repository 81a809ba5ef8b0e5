"""Loss spikes: which steps count as one, and what a run remembers to go back and skip the cause.

A step is a spike when its loss or gradient norm is not finite, or far above those of the `window`
steps before it:

    loss          > median + max(sigmas * spread, loss_rise)
    log grad_norm > median + max(sigmas * spread, log(norm_rise))
    spread = 1.05 * median |x_i - x_(i-1)|

For normal noise the spread is the standard deviation. It is taken from step to step, so that a
falling loss does not look like a scattered one. While the loss falls steeply, at the start, few
steps count as spikes all the same.

The loss of step t belongs to the weights after step t-1. So a checkpoint of step c counts as good
only when `proven` steps after it were no spikes, and a run goes back to the newest good one. It
does not repeat batches: it skips all that were drawn since the checkpoint, since the harmful one
may come before the one that showed the harm.

Next file to read: v4jax/train/resume.py.
"""

import dataclasses
import itertools
import math
import statistics
from typing import Any


class TrainingFailed(RuntimeError):
    """The run cannot go on: its loss is not finite, or spikes again and again.

    The last checkpoint is intact.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    """When a run goes back to a checkpoint, and how often.

    Raises:
      ValueError: names the field, the value and the rule.
    """

    rollbacks: int = 0
    """Rollbacks of a run, at most. 0: none, and a loss that is not finite ends the run. Above 0
    the loss is read after every step."""
    window: int = 64
    """How many of the latest steps a step is compared with; not below `least`."""
    least: int = 16
    """With fewer earlier steps than this, nothing counts as a spike yet; at least 2."""
    sigmas: float = 8.0
    """Standard deviations above the median that are still ordinary, above 0."""
    loss_rise: float = 0.5
    """Nats above the median loss that are still ordinary, above 0."""
    norm_rise: float = 20.0
    """Multiple of the median gradient norm that is still ordinary, above 1."""
    proven: int = 1
    """Steps without a spike that prove the checkpoint before them good; 1 or more."""
    anticipate: int = 0
    """After a rollback, choose experts ahead of time until this many steps past the spike; 0:
    never."""
    anticipate_lag: int = 1
    """How many steps ahead to choose experts then, 1 or more."""

    def __post_init__(self):
        rules = {
            "rollbacks": (self.rollbacks >= 0, "0 or above"),
            "least": (2 <= self.least <= self.window, f"in [2, window={self.window}]"),
            "sigmas": (self.sigmas > 0, "above 0"),
            "loss_rise": (self.loss_rise > 0, "above 0"),
            "norm_rise": (self.norm_rise > 1, "above 1"),
            "proven": (self.proven >= 1, "at least 1"),
            "anticipate": (self.anticipate >= 0, "0 or above"),
            "anticipate_lag": (self.anticipate_lag >= 1, "at least 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"stability.{name}: got {getattr(self, name)}; must be {rule}")


@dataclasses.dataclass(frozen=True)
class LossHistory:
    """What a run remembers besides its state; every checkpoint has it, as JSON.

    Attributes:
      rollbacks: how often the run went back.
      base: the step it last went back to, whose checkpoint was good.
      skipped: first and last of each range of skipped batches, counted from 1 in data order.
      anticipate_until: the last step with experts chosen ahead.
      losses, grad_norms: of the last steps that were no spikes, oldest first.
    """

    rollbacks: int = 0
    base: int = 0
    skipped: tuple[tuple[int, int], ...] = ()
    anticipate_until: int = 0
    losses: tuple[float, ...] = ()
    grad_norms: tuple[float, ...] = ()

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: dict) -> "LossHistory":
        fields: dict[str, Any] = dict(value)
        fields |= {name: tuple(value[name]) for name in ("losses", "grad_norms")}
        fields["skipped"] = tuple(map(tuple, value["skipped"]))
        return LossHistory(**fields)

    def batch(self, step: int) -> int:
        """The number of the batch that this step trains on, counted from 1 in data order.

        Example: skipped (5, 9), step 5 -> batch 10.
        """
        return step + sum(last - first + 1 for first, last in self.skipped)


def spike(cfg: StabilityConfig, history: LossHistory, loss: float, grad_norm: float) -> str | None:
    """Says why a step is a spike; None if it is none.

    Without rollbacks only a value that is not finite is a spike.
    """
    for name, value in (("loss", loss), ("grad_norm", grad_norm)):
        if not math.isfinite(value):
            return f"{name} is {value}"
    if not cfg.rollbacks or len(history.losses) < cfg.least:
        return None
    if loss > (limit := _limit(history.losses, cfg.sigmas, cfg.loss_rise)):
        return f"loss is {loss:.4g}, above {limit:.4g}"
    *logs, log = [math.log(max(norm, 1e-30)) for norm in (*history.grad_norms, grad_norm)]
    limit = _limit(logs, cfg.sigmas, math.log(cfg.norm_rise))
    if log > limit:  # compared as logs: exp(limit) may overflow where norms scatter widely
        return f"grad_norm is {grad_norm:.4g}, above {math.exp(limit):.4g}"
    return None


def _limit(values, sigmas: float, rise: float) -> float:
    """The largest value that is still ordinary after `values`."""
    middle = statistics.median(values)
    spread = 1.05 * statistics.median(abs(b - a) for a, b in itertools.pairwise(values))
    return middle + max(sigmas * spread, rise)


def remember(
    cfg: StabilityConfig, history: LossHistory, loss: float, grad_norm: float
) -> LossHistory:
    """The history after a step that was no spike; unchanged without rollbacks."""
    if not cfg.rollbacks:
        return history

    def keep(values, new):
        return (*values, new)[-cfg.window :]

    return dataclasses.replace(
        history, losses=keep(history.losses, loss), grad_norms=keep(history.grad_norms, grad_norm)
    )


def gone_back(
    cfg: StabilityConfig,
    history: LossHistory,
    step: int,
    good: LossHistory,
    good_step: int,
    drawn: int,
) -> LossHistory:
    """The history of a run that goes on from a good checkpoint.

    Args:
      history: of the run at its spike in step number `step`.
      good, good_step: history and step of the checkpoint.
      drawn: number of the last batch taken from the data.

    Example: checkpoint of step 10, spike at step 14 -> batches 11 to 14 are skipped, and step 11
    trains on batch 15. Another spike at step 12, with no checkpoint in between -> 11 to 16 are
    skipped.
    """
    skipped = (*good.skipped, (good.batch(good_step) + 1, drawn))
    until = max(history.anticipate_until, step + cfg.anticipate) if cfg.anticipate else 0
    return dataclasses.replace(
        good,
        rollbacks=history.rollbacks + 1,
        base=good_step,
        skipped=skipped,
        anticipate_until=until,
    )
