"""Estimates the forward passes of frozen models in a step, such as DPO's reference.

To compute every layer again in the backward pass is to run the network forward once more. So one
pass costs what remat "layer" adds to "none". Its head is left out: it is less than MTP's, which the
other terms count and these objectives do not compute.

Next file to read: v4jax/planner/terms.py.
"""

import dataclasses
from collections.abc import Callable, Iterable

from v4jax.planner.terms import Term
from v4jax.train.config import TrainConfig
from v4jax.train.objective import frozen_passes


def reference_terms(
    cfg: TrainConfig, terms_for: Callable[[TrainConfig], Iterable[Term]]
) -> list[Term]:
    """The terms that frozen models add to a step; [] for an objective without any.

    Args:
      terms_for: the terms of kinds "flops", "hbm" and "sent" of a step of a configuration.
    """
    count = frozen_passes(cfg)
    if not count:
        return []
    more, less = (terms_for(dataclasses.replace(cfg, remat=name)) for name in ("layer", "none"))
    return [_times(count, term) for term in more] + [_times(-count, term) for term in less]


def _times(factor: float, term: Term) -> Term:
    return term._replace(coefficient=factor * term.coefficient, calls=factor * term.calls)
