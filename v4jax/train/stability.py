"""Loss spikes: when a step counts as one, and what a run remembers so that it can go back and pass by what caused it.

A step is a spike when its loss or gradient norm is not finite, or stands far above those of the steps before it:

    loss          > median + max(sigmas * spread, loss_rise)         over the last `window` steps;
    log grad_norm > median + max(sigmas * spread, log(norm_rise))    spread = 1.05 * median |x_i - x_(i-1)|

The spread is a normal's standard deviation, taken from step to step so that a loss that falls does not look like one that scatters; while
it falls steeply, in the first hundred steps, little is called a spike all the same.

The loss of step t is that of the weights after step t-1. So a checkpoint of step c is taken for good only when `proven` steps after it
were no spikes, and a run goes back to the newest such one. Batches are not gone back over: all that were drawn since the checkpoint are
skipped, since the one that did the harm may lie before the one that showed it.

Next file to read: v4jax/train/resume.py.
"""

import dataclasses
import itertools
import math
import statistics


class TrainingFailed(RuntimeError):
    """The run cannot go on (a loss that is not finite, or spikes without end). The last checkpoint is intact."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    """When to go back, and how often.

    Raises:
      ValueError: naming the field, the value and the rule.
    """

    rollbacks: int = 0
    """Most rollbacks of a run. 0: none, and a loss that is not finite ends the run. Above 0 the
    loss is read after every step."""
    window: int = 64
    """Earlier steps that a step is compared with, at least `least`."""
    least: int = 16
    """Fewer earlier steps than this call nothing a spike yet; at least 2."""
    sigmas: float = 8.0
    """Standard deviations above the median that are still ordinary, above 0."""
    loss_rise: float = 0.5
    """Nats above the median loss that are still ordinary, above 0."""
    norm_rise: float = 20.0
    """Multiple of the median gradient norm that is still ordinary, above 1."""
    proven: int = 1
    """Steps without a spike that prove the checkpoint before them good; 1 or more."""
    anticipate: int = 0
    """After a rollback, choose experts ahead of time until so many steps past the spike; 0:
    never."""
    anticipate_lag: int = 1
    """Steps ahead that experts are then chosen, 1 or more."""

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
    """What a run remembers beside its weights; it is in every checkpoint, as JSON.

    Attributes:
      rollbacks: how often it went back.
      base: the step it last went back to, whose checkpoint was good then.
      skipped: first and last of the batches it passed by, counted from 1 in the order of the data.
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
        tuples = {name: tuple(value[name]) for name in ("losses", "grad_norms")}
        return LossHistory(**value | tuples | {"skipped": tuple(map(tuple, value["skipped"]))})

    def batch(self, step: int) -> int:
        """Which batch of the data this step trains on. Example: skipped (5, 9), step 5 -> batch 10."""
        return step + sum(last - first + 1 for first, last in self.skipped)


def spike(cfg: StabilityConfig, history: LossHistory, loss: float, grad_norm: float) -> str | None:
    """Why a step is a spike, in words; None if it is none. Without rollbacks only what is not finite is one."""
    for name, value in (("loss", loss), ("grad_norm", grad_norm)):
        if not math.isfinite(value):
            return f"{name} is {value}"
    if not cfg.rollbacks or len(history.losses) < cfg.least:
        return None
    if loss > (limit := _limit(history.losses, cfg.sigmas, cfg.loss_rise)):
        return f"loss is {loss:.4g}, above {limit:.4g}"
    *logs, log = [math.log(max(norm, 1e-30)) for norm in (*history.grad_norms, grad_norm)]
    limit = _limit(logs, cfg.sigmas, math.log(cfg.norm_rise))
    if log > limit:  # the limit of norms that scatter widely is too large for exp
        return f"grad_norm is {grad_norm:.4g}, above {math.exp(limit):.4g}"
    return None


def _limit(values, sigmas: float, rise: float) -> float:
    middle = statistics.median(values)
    spread = 1.05 * statistics.median(abs(b - a) for a, b in itertools.pairwise(values))
    return middle + max(sigmas * spread, rise)


def remember(
    cfg: StabilityConfig, history: LossHistory, loss: float, grad_norm: float
) -> LossHistory:
    """The history after a step that was no spike; as it was, without rollbacks."""
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
      history: of the run as it was, at the spike of `step`. good, good_step: of the checkpoint. drawn: the last batch taken from the data.

    Example: checkpoint of step 10, spike at step 14 -> batches 11 to 14 are skipped and step 11 trains on batch 15. Another one at
    step 12, with no checkpoint between: 11 to 16 are skipped.
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
