"""Estimates what weights send: each is gathered where it is used, and its gradient is summed.

Next file to read: v4jax/planner/token_traffic.py.
"""

import math
from collections.abc import Mapping

from v4jax.planner.recompute import recomputes
from v4jax.planner.terms import Term, sent
from v4jax.planner.weights import Cut, Weight
from v4jax.train.config import TrainConfig


def weight_sent(
    cfg: TrainConfig,
    weight: Weight,
    cut: Cut,
    tokens: list[str],
    seq: list[str],
    sizes: Mapping[str, int],
    platform: str,
) -> list[Term]:
    """What one weight sends: it is gathered where it is used, and its gradient is summed."""
    if weight.optimizer == "none":
        return []
    item = min(bytes_in_products(cfg, weight), weight.held)  # packed weights travel as they are
    # Rows of the embedding table are looked up where they lie.
    cut_tokens = (
        [] if weight.part == "embedding" else [axis for axis in tokens if axis in cut.token_axes]
    )
    if cfg.gather == "step":
        axes = [axis for axis in tokens if axis in cut.token_axes]
        terms = weight_gathered(weight, cut, axes, item, sizes, 1 / cfg.micro_batches)
    else:
        times = 2 if recomputes(cfg, weight.part) else 1
        terms = weight_gathered(weight, cut, cut_tokens, item, sizes, times)
    if weight.optimizer in ("frozen", "constant"):
        return terms
    return terms + _gradient(cfg, weight, cut, cut_tokens, tokens, seq, sizes, platform)


def bytes_in_products(cfg: TrainConfig, weight: Weight) -> int:
    """Bytes of a number of `weight` as products use it."""
    return 4 if weight.float32 or cfg.dtype == "float32" else 2


def weight_gathered(
    weight: Weight,
    cut: Cut,
    axes: list[str],
    item: float,
    sizes: Mapping[str, int],
    times: float = 1,
) -> list[Term]:
    """A weight, gathered `times` times a micro-batch over `axes`.

    The outermost axis moves the whole weight, each further axis a part of it.
    """
    whole, terms = weight.size / cut.others * item, []
    for step in [axes] if weight.is_expert and axes else [[axis] for axis in axes]:
        n = math.prod(sizes[axis] for axis in step)
        terms.append(
            sent(
                weight.part,
                step,
                "all-gather",
                times * whole * (n - 1) / n,
                calls=times * weight.layers,
            )
        )
        whole /= n
    return terms


def _gradient(
    cfg: TrainConfig,
    weight: Weight,
    cut: Cut,
    scattered: list[str],
    tokens: list[str],
    seq: list[str],
    sizes: Mapping[str, int],
    platform: str,
) -> list[Term]:
    """The sum of a weight's gradient over devices with other tokens.

    It is scattered where the weight is cut, and summed in full elsewhere.
    """
    part, numbers = weight.part, weight.size / cut.others
    table = weight.part == "embedding"
    item = 4 if weight.float32 or weight.is_expert or table or cfg.dtype == "float32" else 2
    held = [axis for part_ in cut.parts for axis in part_]
    rest = [axis for axis in tokens if axis not in scattered and axis not in held]
    if platform == "cpu" and not weight.is_expert and not table:
        both = [axis for axis in tokens if axis in scattered + rest]
        return _summed_at_once(weight, numbers * item, both, not scattered, seq, sizes)
    n, r = (math.prod(sizes[axis] for axis in axes) for axes in (scattered, rest))
    terms = []
    if scattered:
        # Some sums are made in full, at twice the bytes, and a part is kept: the head's always; on
        # XLA:TPU also those of experts over all devices, and of other weights over several axes.
        if weight.is_expert:
            odd = n == math.prod(sizes.values())
        else:
            odd = len(scattered) > 1 and not table
        full = (platform == "tpu" and odd) or weight.part == "head"
        kind = "all-reduce" if full else "reduce-scatter"
        times = 2 if full else 1
        size = times * numbers * item * (n - 1) / n
        terms.append(sent(part, scattered, kind, size, "one", weight.layers, 1 / times))
    if rest:  # experts are summed over the other axes while they are whole
        left = numbers * item / (cut.tokens if table else 1 if weight.is_expert else n)
        terms.append(sent(part, rest, "all-reduce", 2 * left * (r - 1) / r, calls=weight.layers))
    return terms


def _summed_at_once(
    weight: Weight,
    size: float,
    axes: list[str],
    whole: bool,
    seq: list[str],
    sizes: Mapping[str, int],
) -> list[Term]:
    """The sum of a gradient of `size` bytes as XLA:CPU makes it: over all axes, then cut.

    A layer's weight that is not cut (`whole`) is summed over the sequence first and then over the
    batch.
    """
    steps = [axes]
    if weight.uses and whole and weight.part != "head":
        steps = [[axis for axis in axes if axis in seq], [axis for axis in axes if axis not in seq]]
    terms = []
    for step in steps:
        n = math.prod(sizes[axis] for axis in step)
        moved = 2 * size * (n - 1) / n
        terms.append(sent(weight.part, step, "all-reduce", moved, calls=weight.layers))
    return terms
