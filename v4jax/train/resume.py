"""Where a run begins: at its newest checkpoint or its first state.

Next file to read: v4jax/train/same_data.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from sharding.agreement import anywhere
from sharding.rules import AxisRules
from v4jax.checkpoint.json_item import JsonItem
from v4jax.checkpoint.store import DAMAGED, Store
from v4jax.checkpoint.store_params import check_same_arrays
from v4jax.functional import init_params
from v4jax.storage import Place
from v4jax.train.anticipate import ahead_placed
from v4jax.train.config import TrainConfig
from v4jax.train.finite import not_finite
from v4jax.train.initial import frozen_base
from v4jax.train.same_data import place_in_data
from v4jax.train.stability import LossHistory
from v4jax.train.step import TrainState, state_from


class Begin(NamedTuple):
    """What a run goes on from.

    Attributes:
      step: steps that the state has done.
      history: losses and rollbacks so far.
      ahead: batches that were drawn ahead (anticipate.RoutedBatchQueue.items).
      changed: how the data differs from before, in words.
    """

    state: TrainState
    step: int
    history: LossHistory
    ahead: dict[str, Any]
    changed: tuple[str, ...] = ()


def start(
    cfg: TrainConfig,
    rules: AxisRules,
    shardings: Any,
    store: Store,
    data,
    first: Callable[[], TrainState],
) -> Begin:
    """The newest intact checkpoint, with the data iterator moved to its position, or a first state.

    Args:
      shardings: the place of each array of a TrainState (step.state_shardings).
      data: the batches (stages.Batches); its position is set.
      first: makes the state of a run without a checkpoint.

    Raises:
      ValueError: the checkpoint does not fit the run, or holds a number that is not finite.
    """
    step = store.latest_intact(strict=cfg.strict)
    if step is None:
        return Begin(first(), 0, LossHistory(), {})
    store.put_aside_after(step, DAMAGED)
    if step > cfg.steps:
        raise ValueError(f"steps: got {cfg.steps}; {cfg.run_dir} has already done {step}")
    path = store.path(step)
    moved, changed = place_in_data(cfg, path, data, step)
    more = {} if moved else {"data": data} | _ahead(path, rules, shardings.step.mesh)
    begin = load(cfg, shardings, store, step, more)
    if wrong := not_finite(begin.state):
        raise ValueError(
            f"{path}: {wrong}; remove this folder to resume from the checkpoint before it"
        )
    return begin._replace(changed=changed)


def _ahead(path: Place, rules: AxisRules, mesh: Mesh) -> dict[str, Any]:
    """The item of batches drawn ahead, as Store.load takes it; {} for a checkpoint without it."""
    if not anywhere((path / "ahead").is_dir()):
        return {}
    return {"ahead": ahead_placed(ocp.metadata(str(path), "ahead").metadata, rules, mesh)}


def items_of(state: TrainState, history: LossHistory) -> dict[str, Any]:
    """The items of a run's checkpoint, except its data position."""
    return {
        "params": state.saved,
        "optimizer": state.optimizer,
        "record": JsonItem(history.to_json()),
    }


def load(
    cfg: TrainConfig, shardings, store: Store, step: int, more: dict[str, Any], base: Any = None
) -> Begin:
    """A checkpoint's state and loss history.

    Args:
      more: the other items to load, as Store.load takes them.
      base: the frozen weights, with cfg.lora; None: they are read.

    Raises:
      ValueError: the checkpoint does not fit the run.
    """
    fresh = jax.eval_shape(lambda: state_from(cfg, init_params(cfg.model, jax.random.key(0))))
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        *(dataclasses.replace(state, base={}) for state in (fresh, shardings)),
    )
    check_same_arrays(store.path(step), abstract.saved)
    _check_state_dtypes(store.path(step), abstract.optimizer)
    item = JsonItem(LossHistory().to_json())
    # Checkpoints of older versions have no loss history; they resume with an empty one.
    if not anywhere(not (store.path(step) / "record").is_dir()):
        more = more | {"record": item}
    items = store.load(step, {"params": abstract.saved, "optimizer": abstract.optimizer} | more)
    router = items["params"].pop("router")
    count = jax.make_array_from_callback((), shardings.step, lambda _: np.asarray(step, np.int32))
    if base is None:
        base = frozen_base(cfg, shardings)
    state = TrainState(items["params"], router, items["optimizer"], count, base)
    return Begin(state, step, LossHistory.from_json(item.value), items.get("ahead", {}))


def _check_state_dtypes(path: Place, optimizer) -> None:
    """Raises ValueError if the optimizer's state is stored in another dtype than the run's.

    Orbax would cast in silence, and the run would not continue bit for bit.
    """

    def dtypes(tree) -> dict[str, np.dtype]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(key, simple=True): leaf.dtype for key, leaf in leaves}

    want = dtypes(optimizer)
    for name, have in dtypes(ocp.metadata(str(path), "optimizer").metadata).items():
        if have != want.get(name, have):
            field = "momentum_dtype" if "momentum" in name else "moment_dtype"
            raise ValueError(
                f"{field}: got {want[name]}; {path} has {have}: resume with that, or begin a new "
                "run with init_from"
            )
