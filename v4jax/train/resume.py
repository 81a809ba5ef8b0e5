"""Where a run begins: at its newest checkpoint, at weights it is given, or fresh; and where it begins again after a spike.

Next file to read: v4jax/train/loop.py.
"""

import dataclasses
import functools
import logging
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from sharding.processes import anywhere
from sharding.rules import AxisRules
from v4jax.api import load_onto
from v4jax.checkpoint.json_item import JsonItem
from v4jax.checkpoint.store import ABANDONED, CHECKPOINTS, DAMAGED, Store, check_same_arrays
from v4jax.config import ModelConfig
from v4jax.data.config import tokenizer_of
from v4jax.data.identity import differences, evaluation_differences, saved_settings, settings_of
from v4jax.data.listing import Listings
from v4jax.stderr import say
from v4jax.storage import local_path
from v4jax.tokenizer import Tokenizer, token_table
from v4jax.train.anticipate import ahead_placed
from v4jax.train.config import TrainConfig
from v4jax.train.finite import not_finite
from v4jax.train.stability import LossHistory, TrainingFailed, gone_back
from v4jax.train.stages import stream_view
from v4jax.train.step import TrainState, init_state, state_from


class Begin(NamedTuple):
    """The state, how many steps it has done, what is remembered, batches that were drawn ahead
    (anticipate.RoutedBatchQueue.items), and what of the data is not as it was, in words."""

    state: TrainState
    step: int
    history: LossHistory
    ahead: dict[str, Any]
    changed: tuple[str, ...] = ()


def check_data(cfg: TrainConfig, tokenizer: Tokenizer, listings: Listings | None = None) -> None:
    """Refuses to go on with other data than the newest checkpoint's, before long work or writing.

    Raises:
      ValueError: names the first setting or file that differs.
    """
    folder = local_path(cfg.run_dir, "run_dir") / CHECKPOINTS
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
    newest = max(steps, default=0)
    saved = saved_settings(folder / str(newest) / "data")
    if saved is not None:
        view = stream_view(cfg, newest - 1)
        sizes = view.seq_len, view.batch_size
        _changes(cfg, saved, settings_of(view.data, tokenizer, *sizes, listings))


def start(
    cfg: TrainConfig,
    rules: AxisRules,
    shardings: TrainState,
    store: Store,
    data,
    unsaved: TrainState | None = None,
) -> Begin:
    """The newest intact checkpoint with the data iterator set to its place, or a fresh state.

    Args:
      unsaved: a fresh state that is there already, for a run without a checkpoint.

    Raises:
      ValueError: the checkpoint does not fit the run, or holds a number that is not finite.
    """
    step = store.latest_intact(strict=cfg.strict)
    if step is None:
        return Begin(fresh(cfg, shardings) if unsaved is None else unsaved, 0, LossHistory(), {})
    store.put_aside_after(step, DAMAGED)
    if step > cfg.steps:
        raise ValueError(f"steps: got {cfg.steps}; {cfg.run_dir} has already done {step}")
    saved = saved_settings(store.path(step) / "data") or {}
    moved, changed = _changes(cfg, saved, data.at(step - 1).settings)
    moved = anywhere(moved)
    _say_on_resume(store.path(step), saved, moved, changed)
    if moved:
        return _load(cfg, shardings, store, step, {})._replace(changed=changed)
    ahead, path = {}, store.path(step) / "ahead"
    if anywhere(path.is_dir()):
        ahead = {
            "ahead": ahead_placed(
                ocp.metadata(store.path(step), "ahead").metadata, rules, shardings.step.mesh
            )
        }
    return _load(cfg, shardings, store, step, {"data": data} | ahead)._replace(changed=changed)


def _changes(
    cfg: TrainConfig, saved: dict[str, Any], ours: dict[str, Any]
) -> tuple[bool, tuple[str, ...]]:
    """(whether the position in the data has lost its meaning, what differs in words).

    Raises:
      ValueError: something differs, and not cfg.data.allow_change.
    """
    trained = differences(saved, ours)
    evaluated = evaluation_differences(saved, ours)
    if trained and not cfg.data.allow_change:
        raise ValueError(
            f"data position: {trained[0]}; only the same can go on "
            "(--data.allow-change: from a fresh position)"
        )
    if evaluated and not cfg.data.allow_change:
        raise ValueError(
            f"{evaluated[0]}; its loss cannot be compared any more: "
            "give it another name (or --data.allow-change)"
        )
    return bool(trained), tuple(map(str, trained + evaluated))


def _say_on_resume(
    path: pathlib.Path, saved: dict[str, Any], moved: bool, changed: tuple[str, ...]
) -> None:
    """Says on stderr that data changed, or what of an older checkpoint shows whether they did."""
    if "files" not in saved:
        say(
            f"{path} is of an older v4jax: whether data and tokenizer are the same is checked by "
            f"{', '.join(saved) or 'nothing'} alone"
        )
    if not changed:
        return
    where = "where it was"
    if moved:
        where = (
            "from a fresh position in the data; documents that were trained on may be held out "
            "now, and the other way round"
        )
    more = f" (and {len(changed) - 1} other difference(s))" if len(changed) > 1 else ""
    say(f"data changed: {path} {changed[0]}{more}; allow_change: going on {where}")


def items_of(state: TrainState, history: LossHistory) -> dict[str, Any]:
    """What a checkpoint holds of a run, but for the data's position."""
    return {
        "params": state.public,
        "optimizer": state.optimizer,
        "record": JsonItem(history.to_json()),
    }


def go_back(
    cfg: TrainConfig,
    shardings,
    store: Store,
    state: TrainState,
    history: LossHistory,
    step: int,
    drawn: int,
    why: str,
) -> Begin:
    """`start` after a spike at `step`, with the data left where it is; newer checkpoints are moved to abandoned/.

    Args:
      state: of the spike; its memory is freed. history: of the run up to there. drawn: the last batch taken from the data.
      why: the spike, in words.

    Raises:
      TrainingFailed: no rollback is left, or no checkpoint from long enough before the spike.
    """
    if history.rollbacks >= cfg.stability.rollbacks:
        spent = f" after {history.rollbacks} rollback(s)" if history.rollbacks else ""
        raise TrainingFailed(f"step {step}: {why}{spent}; last checkpoint: {store.latest}")
    store.wait()  # a save may still read the state
    jax.tree.map(lambda leaf: leaf.delete(), state)
    newest = max(step - 1 - cfg.stability.proven, history.base)
    good_step = store.latest_intact(newest=newest)
    if good_step is None and newest >= cfg.checkpoint_every:
        raise TrainingFailed(
            f"step {step}: {why}; no checkpoint of step {newest} or before it to go back to; last: {store.latest}"
        )
    logging.getLogger("v4jax").warning(
        "step %d: %s; going back to step %d", step, why, good_step or 0
    )
    store.put_aside_after(good_step or 0, ABANDONED)
    if good_step is None:
        good = Begin(fresh(cfg, shardings), 0, LossHistory(), {})
    else:
        good = _load(cfg, shardings, store, good_step, {})
    return good._replace(
        history=gone_back(cfg.stability, history, step, good.history, good.step, drawn)
    )


def _load(cfg: TrainConfig, shardings, store: Store, step: int, more: dict[str, Any]) -> Begin:
    """A checkpoint's state and loss history; `more`: its other items, as Store.load takes them."""
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(functools.partial(init_state, cfg, shardings)),
        shardings,
    )
    check_same_arrays(store.path(step), abstract.public)
    item = JsonItem(LossHistory().to_json())
    if not anywhere(
        not (store.path(step) / "record").is_dir()
    ):  # runs from before there were records go on too
        more = more | {"record": item}
    items = store.load(step, {"params": abstract.public, "optimizer": abstract.optimizer} | more)
    router = items["params"].pop("router")
    count = jax.make_array_from_callback((), shardings.step, lambda _: np.asarray(step, np.int32))
    state = dataclasses.replace(
        abstract, params=items["params"], router=router, optimizer=items["optimizer"], step=count
    )
    if wrong := not_finite(state):
        raise ValueError(
            f"{store.path(step)}: {wrong}; without it the run goes on from an older checkpoint"
        )
    return Begin(state, step, LossHistory.from_json(item.value), items.get("ahead", {}))


def fresh(cfg: TrainConfig, shardings) -> TrainState:
    """The state a run begins with: random weights, or those it is given.

    Raises:
      ValueError: weights that cannot be read, are those of another model, or are not finite.
    """
    return _from_weights(cfg, shardings) if cfg.init_from else init_state(cfg, shardings)


def check_source(cfg: TrainConfig) -> None:
    """Refuses to start from weights of another model or of other tokens; names what differs."""
    found = ModelConfig.from_json(cfg.init_from)
    if name := cfg.model.difference(found):
        theirs, ours = found.to_dict().get(name), cfg.model.to_dict().get(name)
        head = f"init_from: {cfg.init_from} is another model"
        raise ValueError(f"{head}: {name} is {theirs} there, {ours} here")
    path = local_path(cfg.init_from, "init_from") / "tokenizer.json"
    if not path.is_file() or cfg.data.allow_change:
        return
    theirs = token_table(path.read_text(encoding="utf-8"))
    mine = token_table(tokenizer_of(cfg.data).json_text)
    for token in sorted(theirs.keys() & mine.keys()):
        if theirs[token] != mine[token]:
            raise ValueError(
                f"init_from: {cfg.init_from} has another tokenizer: id {token} is "
                f"{theirs[token]!r} there, {mine[token]!r} here "
                "(--data.allow-change goes on all the same)"
            )


def _from_weights(cfg: TrainConfig, shardings) -> TrainState:
    """A state whose weights and router tables are those of `cfg.init_from`; everything else is fresh.

    Raises:
      ValueError: no checkpoint, one of another model, or a weight that is not finite.
    """
    check_source(cfg)
    params = load_onto(cfg.init_from, cfg.model, "float32", shardings.public)
    around = functools.partial(state_from, cfg)
    state = jax.jit(around, out_shardings=shardings, donate_argnums=0)(params)
    if wrong := not_finite(state):
        raise ValueError(f"init_from: {cfg.init_from}: {wrong}")
    return state
