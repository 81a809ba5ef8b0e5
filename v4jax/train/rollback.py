"""Goes back to a good checkpoint after a loss spike.

Next file to read: v4jax/train/loop.py.
"""

import dataclasses
import logging

import jax

from v4jax.checkpoint.store import ABANDONED, Store
from v4jax.train.config import TrainConfig
from v4jax.train.finite import not_finite
from v4jax.train.initial import fresh
from v4jax.train.resume import Begin, load
from v4jax.train.stability import LossHistory, TrainingFailed, gone_back
from v4jax.train.step import TrainState


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
        good = _newest_good(cfg, shardings, store, newest, state.base)
    except ValueError as error:
        raise TrainingFailed(f"{head}; there is nothing to go back to: {error}") from error
    if good is None and newest >= cfg.checkpoint_every:
        raise TrainingFailed(
            f"{head}; no checkpoint of step {newest} or before it to go back to; "
            f"last: {store.latest}"
        )
    if good is None:
        jax.tree.map(lambda leaf: leaf.delete(), state.base)
        good = Begin(fresh(cfg, shardings), 0, LossHistory(), {})
    logging.getLogger("v4jax").warning("%s; going back to step %d", head, good.step)
    store.put_aside_after(good.step, ABANDONED)
    back = gone_back(cfg.stability, history, step, good.history, good.step, drawn)
    return good._replace(history=back)


def _newest_good(cfg: TrainConfig, shardings, store: Store, newest: int, base) -> Begin | None:
    """The newest checkpoint up to step `newest` that is intact and finite; None for none.

    Older versions did not check (train/finite.py) and saved states that are not finite.

    Raises:
      ValueError: all are damaged, or one is of another model.
    """
    while (step := store.latest_intact(newest=newest)) is not None:
        good = load(cfg, shardings, store, step, {}, base)
        wrong = not_finite(good.state)
        if wrong is None:
            return good
        logging.getLogger("v4jax").warning("%s: %s; it is passed over", store.path(step), wrong)
        _free(good.state)
        newest = step - 1
    return None


def _free(state: TrainState) -> None:
    """Frees the device memory of a state, except the frozen base, which stays in use."""
    jax.tree.map(lambda leaf: leaf.delete(), dataclasses.replace(state, base={}))
