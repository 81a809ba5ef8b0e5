"""Where a run begins: at its newest checkpoint or its first state, and again after a loss spike.

Next file to read: v4jax/train/loop.py.
"""

import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from sharding.agreement import agreed, anywhere, gather_text
from sharding.rules import AxisRules
from v4jax.checkpoint.json_item import JsonItem
from v4jax.checkpoint.store import ABANDONED, DAMAGED, Store
from v4jax.checkpoint.store_params import check_same_arrays
from v4jax.data.identity import differences, evaluation_differences, saved_settings, settings_of
from v4jax.data.listing import Listings
from v4jax.stderr import say
from v4jax.tokenizer import Tokenizer
from v4jax.train.anticipate import ahead_placed
from v4jax.train.config import TrainConfig
from v4jax.train.finite import not_finite
from v4jax.train.initial import fresh
from v4jax.train.stability import LossHistory, TrainingFailed, gone_back
from v4jax.train.stages import number_at, saved_streams, stream_at, stream_view
from v4jax.train.step import TrainState, init_state


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


def check_data(cfg: TrainConfig, tokenizer: Tokenizer, listings: Listings | None = None) -> None:
    """Refuses data other than the checkpoint's, before any long work or writing.

    It looks only at the data position of the newest checkpoint. If that one is refused, it looks
    for the checkpoint that `start` will take, which means reading all of the newest one.

    Raises:
      ValueError: names the first setting or file that differs; the same in every process.
    """
    with Store(cfg.run_dir) as store:
        newest = store.latest
        try:
            _check_position(cfg, tokenizer, store.path(newest), newest, listings)
        except ValueError:
            intact = store.latest_intact(strict=cfg.strict)
            if intact == newest:
                raise
            _check_position(cfg, tokenizer, store.path(intact), intact, listings)


def _check_position(
    cfg: TrainConfig, tokenizer: Tokenizer, path: pathlib.Path, step: int, listings: Listings | None
) -> None:
    """Refuses data other than that of the checkpoint at `path`, of step number `step`."""

    def ours(done: int) -> dict[str, Any]:
        view = stream_view(cfg, done)
        return settings_of(view.data, tokenizer, view.seq_len, view.batch_size, listings)

    with agreed():
        _changes(cfg, saved_settings(path / "data"), ours(step - 1))
        _other_changes(cfg, path / "data", step, ours)


def start(
    cfg: TrainConfig,
    rules: AxisRules,
    shardings: TrainState,
    store: Store,
    data,
    first: Callable[[], TrainState],
) -> Begin:
    """The newest intact checkpoint, with the data iterator moved to its position, or a first state.

    Args:
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
    moved, changed = _place_in_data(cfg, path, data, step)
    more = {} if moved else {"data": data} | _ahead(path, rules, shardings.step.mesh)
    begin = _load(cfg, shardings, store, step, more)
    if wrong := not_finite(begin.state):
        raise ValueError(
            f"{path}: {wrong}; remove this folder to resume from the checkpoint before it"
        )
    return begin._replace(changed=changed)


def _place_in_data(
    cfg: TrainConfig, path: pathlib.Path, data, step: int
) -> tuple[bool, tuple[str, ...]]:
    """(whether the saved position is useless, what differs in words), over all processes.

    Turns `data` to the stream of the checkpoint, and says on stderr what changed.

    Raises:
      ValueError: see _changes; the same in every process.
    """
    with agreed():
        saved = saved_settings(path / "data")
        moved, changed = _changes(cfg, saved, data.at(step - 1).settings)
        others = _other_changes(cfg, path / "data", step, lambda done: data.at(done).settings)
        data.at(step - 1)
    anew = [number for number, found in others.items() if found]
    data.skip(number for text in gather_text(json.dumps(anew)) for number in json.loads(text))
    moved = anywhere(moved)
    if not moved:
        changed += tuple(one for found in others.values() for one in found)
    changed = _found_anywhere(changed)
    _say_on_resume(path, saved, moved, changed)
    return moved, changed


def _found_anywhere(changed: tuple[str, ...]) -> tuple[str, ...]:
    """The differences that any process found; those unknown to the first name their process."""
    every = [json.loads(text) for text in gather_text(json.dumps(changed))]
    found = list(every[0])
    for index, theirs in enumerate(every):
        found += [f"process {index}: {one}" for one in theirs if one not in every[0]]
    return tuple(found)


def _ahead(path: pathlib.Path, rules: AxisRules, mesh: Mesh) -> dict[str, Any]:
    """The item of batches drawn ahead, as Store.load takes it; {} for a checkpoint without it."""
    if not anywhere((path / "ahead").is_dir()):
        return {}
    return {"ahead": ahead_placed(ocp.metadata(path, "ahead").metadata, rules, mesh)}


def _changes(
    cfg: TrainConfig, saved: dict[str, Any], ours: dict[str, Any]
) -> tuple[bool, tuple[str, ...]]:
    """(whether the saved position is useless, what differs in words).

    Raises:
      ValueError: something differs, and cfg.data.allow_change is off.
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


def _other_changes(
    cfg: TrainConfig, directory: pathlib.Path, step: int, ours: Callable[[int], dict[str, Any]]
) -> dict[int, tuple[str, ...]]:
    """Number of each saved stream that is not in use -> how it differs, in words.

    Args:
      directory: the checkpoint's item of data positions.
      ours: maps the number of steps done to this run's settings of the stream read then.

    Raises:
      ValueError: something differs, and not cfg.data.allow_change.
    """
    others = {}
    for number, done, path in saved_streams(cfg, directory, stream_at(cfg, step - 1)):
        found = differences(saved_settings(path), ours(done))
        stage = f"stage {number_at(cfg, done)}"
        anew = f"{stage} from a fresh position, should the run go back to it"
        if found and not cfg.data.allow_change:
            raise ValueError(
                f"data position of {stage}: {found[0]}; only the same can go on "
                f"(--data.allow-change: {anew})"
            )
        others[number] = tuple(f"{one} ({anew})" for one in found)
    return others


def _say_on_resume(
    path: pathlib.Path, saved: dict[str, Any], moved: bool, changed: tuple[str, ...]
) -> None:
    """Says on stderr that data changed, or how little an older checkpoint lets it check."""
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
    """The items of a run's checkpoint, except its data position."""
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
    """Goes back to a good checkpoint after a spike at `step`.

    The data stays at its current position, so the run does not repeat the batches since the
    checkpoint. Newer checkpoints move to abandoned/.

    Args:
      state: the state of the spike; its memory is freed.
      history: of the run up to the spike.
      drawn: number of the last batch taken from the data.
      why: the spike, in words.

    Raises:
      TrainingFailed: no rollback is left, or no checkpoint from long enough before the spike.
    """
    head = f"step {step}: {why}"
    if history.rollbacks >= cfg.stability.rollbacks:
        spent = f" after {history.rollbacks} rollback(s)" if history.rollbacks else ""
        raise TrainingFailed(f"{head}{spent}; last checkpoint: {store.latest}")
    store.wait()  # a save may still read the state
    _free(state)
    newest = max(step - 1 - cfg.stability.proven, history.base)
    try:
        good = _newest_good(cfg, shardings, store, newest)
    except ValueError as error:
        raise TrainingFailed(f"{head}; there is nothing to go back to: {error}") from error
    if good is None and newest >= cfg.checkpoint_every:
        raise TrainingFailed(
            f"{head}; no checkpoint of step {newest} or before it to go back to; "
            f"last: {store.latest}"
        )
    if good is None:
        good = Begin(fresh(cfg, shardings), 0, LossHistory(), {})
    logging.getLogger("v4jax").warning("%s; going back to step %d", head, good.step)
    store.put_aside_after(good.step, ABANDONED)
    back = gone_back(cfg.stability, history, step, good.history, good.step, drawn)
    return good._replace(history=back)


def _newest_good(cfg: TrainConfig, shardings, store: Store, newest: int) -> Begin | None:
    """The newest checkpoint up to step `newest` that is intact and finite; None for none.

    Older versions did not check (train/finite.py) and saved states that are not finite.

    Raises:
      ValueError: all are damaged, or one is of another model.
    """
    while (step := store.latest_intact(newest=newest)) is not None:
        good = _load(cfg, shardings, store, step, {})
        wrong = not_finite(good.state)
        if wrong is None:
            return good
        logging.getLogger("v4jax").warning("%s: %s; it is passed over", store.path(step), wrong)
        _free(good.state)
        newest = step - 1
    return None


def _free(state: TrainState) -> None:
    """Frees the device memory of a state."""
    jax.tree.map(lambda leaf: leaf.delete(), state)


def _load(cfg: TrainConfig, shardings, store: Store, step: int, more: dict[str, Any]) -> Begin:
    """A checkpoint's state and loss history.

    Args:
      more: the other items to load, as Store.load takes them.
    """
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(functools.partial(init_state, cfg, shardings)),
        shardings,
    )
    check_same_arrays(store.path(step), abstract.public)
    item = JsonItem(LossHistory().to_json())
    # Checkpoints of older versions have no loss history; they resume with an empty one.
    if not anywhere(not (store.path(step) / "record").is_dir()):
        more = more | {"record": item}
    items = store.load(step, {"params": abstract.public, "optimizer": abstract.optimizer} | more)
    router = items["params"].pop("router")
    count = jax.make_array_from_callback((), shardings.step, lambda _: np.asarray(step, np.int32))
    state = dataclasses.replace(
        abstract, params=items["params"], router=router, optimizer=items["optimizer"], step=count
    )
    return Begin(state, step, LossHistory.from_json(item.value), items.get("ahead", {}))
