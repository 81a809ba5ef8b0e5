"""What a LoRA run trains, in the terms of a step: the pairs, their axes, and their gradients.

The weights hold scale * b (v4jax/adapters/tree.py). Gradients, clipping, weight decay and the
optimizer are those of b itself, so that alpha and rank mean what they mean elsewhere.

Next file to read: v4jax/train/step.py.
"""

from typing import Any

import jax
from jax.sharding import Mesh

from sharding.agreement import agreed
from sharding.params import named_shardings
from sharding.rules import AxisRules
from v4jax.adapters.base import Base, base_at, check_same_base, read_base
from v4jax.adapters.read import load_adapter
from v4jax.adapters.tree import adapter_axes, axes_like, init_adapters, times
from v4jax.parameter_tree import ADAPTERS, TEACHERS, param_axes
from v4jax.storage import Place
from v4jax.train.config import TrainConfig


def trained_axes(cfg: TrainConfig) -> Any:
    """Logical axes of what is trained: the same tree as TrainState.params."""
    if cfg.lora is None:
        return {name: tree for name, tree in param_axes(cfg.model).items() if name != "router"}
    return {ADAPTERS: adapter_axes(cfg.model, cfg.lora)}


def split(cfg: TrainConfig, params: Any) -> tuple[Any, Any]:
    """(what is trained, what is frozen) of the parameters without "router"; pairs are fresh."""
    if cfg.lora is None:
        return params, {}
    key = jax.random.fold_in(jax.random.key(cfg.seed), 0)
    return {ADAPTERS: init_adapters(cfg.model, cfg.lora, key)}, params


def teacher_pairs(cfg: TrainConfig) -> dict[str, Any]:
    """The pairs of each teacher that is an adapter, by its number; NumPy float32, scaled.

    Raises:
      ValueError: see load_adapter; another base than cfg.init_from is refused there.
    """
    found = {}
    for n, name in enumerate(cfg.distill.teachers):
        if name:
            try:
                found[str(n)] = load_adapter(cfg.model, name, cfg.init_from)
            except ValueError as error:
                raise ValueError(f"distill.teachers: {error}") from None
    return found


def teacher_shardings(
    cfg: TrainConfig, rules: AxisRules, mesh: Mesh, pairs: Any = None
) -> dict[str, Any]:
    """{"teachers": where their pairs lie}; {} for an objective without.

    Args:
      pairs: of which the shapes count; None: those of the files.
    """
    if cfg.objective != "distill":
        return {}
    with agreed():
        pairs = teacher_pairs(cfg) if pairs is None else pairs
    axes = {number: axes_like(cfg.model, tree) for number, tree in pairs.items()}
    return {TEACHERS: named_shardings(mesh, rules, pairs, axes)}


def dropout_key(cfg: TrainConfig, step: jax.Array) -> jax.Array | None:
    """The key of the inputs that step number `step` drops; None without dropout.

    It depends on the seed and the step alone, so a run that resumes drops what it would have.
    """
    if cfg.lora is None or cfg.lora.dropout == 0:
        return None
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(cfg.seed), 1), step)


def of_b(cfg: TrainConfig, params: Any) -> Any:
    """The weights that the optimizer moves: b instead of scale * b."""
    if cfg.lora is None:
        return params
    scale = cfg.lora.scale
    return {ADAPTERS: times(1 / scale if scale else 0, params[ADAPTERS])}


def from_b(cfg: TrainConfig, tree: Any) -> Any:
    """Gradients by scale * b become those by b, and updates of b those of scale * b."""
    return tree if cfg.lora is None else {ADAPTERS: times(cfg.lora.scale, tree[ADAPTERS])}


def check_base(cfg: TrainConfig, run: Place, newest: int | None) -> Base | None:
    """The frozen base of a run of adapters, after a check that it is the one of the checkpoints.

    Raises:
      ValueError: the run has checkpoints of another base, or of all weights; or of adapters, where
        cfg trains all weights.
    """
    known = read_base(run)
    if newest is not None and (known is None) != (cfg.lora is None):
        has, wants = ("adapters", "no lora") if known else ("all weights", "lora")
        raise ValueError(f"run_dir: {run} has checkpoints of {has}; this run has {wants}")
    if cfg.lora is None:
        return None
    given = base_at(cfg.init_from)
    if newest is not None and known is not None:
        check_same_base(f"run_dir: {run}", known, given)
    return given
