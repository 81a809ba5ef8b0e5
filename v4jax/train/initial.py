"""The first state of a run: random weights, or those of a given checkpoint.

Next file to read: v4jax/train/resume.py.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np

from sharding.agreement import agreed
from v4jax.adapters.base import refuse_adapters
from v4jax.api import load_onto
from v4jax.checkpoint.store import is_run
from v4jax.config import ModelConfig
from v4jax.parameter_tree import ADAPTERS, TEACHERS
from v4jax.storage import checkpoint_path
from v4jax.tokenizer import Tokenizer
from v4jax.tokenizer.table import token_table, tokens_in
from v4jax.train.adapters import teacher_pairs
from v4jax.train.config import TrainConfig
from v4jax.train.finite import not_finite
from v4jax.train.step import TrainState, init_state, state_from


def check_source_model(cfg: TrainConfig) -> None:
    """Refuses to start from weights of another model.

    Raises:
      ValueError: names the first field that differs, or what is not there.
    """
    try:
        refuse_adapters(checkpoint_path(cfg.init_from, "init_from"))
        found = ModelConfig.from_json(cfg.init_from)
    except ValueError as error:
        raise ValueError(f"init_from: {error}") from None
    if name := cfg.model.difference(found):
        theirs, ours = found.to_dict().get(name), cfg.model.to_dict().get(name)
        head = f"init_from: {cfg.init_from} is another model"
        raise ValueError(f"{head}: {name} is {theirs} there, {ours} here")


def check_source_tokens(cfg: TrainConfig, tokenizer: Tokenizer) -> None:
    """Refuses to start from weights with another tokenizer, unless data.allow_change is set.

    Raises:
      ValueError: names the first id that differs, or a tokenizer.json that cannot be read.
    """
    if cfg.data.allow_change:
        return
    theirs = tokens_in(checkpoint_path(cfg.init_from, "init_from"))
    ours = token_table(tokenizer.json_text) if theirs else {}
    for token in sorted(theirs.keys() & ours.keys()):
        if theirs[token] != ours[token]:
            raise ValueError(
                f"init_from: {cfg.init_from} has another tokenizer: id {token} is "
                f"{theirs[token]!r} there, {ours[token]!r} here "
                "(--data.allow-change goes on all the same)"
            )


def first_state(
    cfg: TrainConfig, shardings: TrainState, newest: int | None
) -> Callable[[], TrainState]:
    """A function that makes the state of step 0; call it once.

    A run without a checkpoint reads and checks its given weights now, so that refused weights leave
    no run directory.

    Args:
      newest: step of the newest checkpoint; None for none.

    Raises:
      ValueError: see fresh.
    """
    if newest is not None or not cfg.init_from:
        return functools.partial(fresh, cfg, shardings)
    state = fresh(cfg, shardings)
    return lambda: state


def fresh(cfg: TrainConfig, shardings: TrainState) -> TrainState:
    """The state of step 0: random or given weights, and a fresh optimizer.

    Raises:
      ValueError: the given weights cannot be read, belong to another model, or are not finite; the
        same in every process.
    """
    if not cfg.init_from:
        return init_state(cfg, shardings)
    around = functools.partial(state_from, cfg)
    state = jax.jit(around, out_shardings=shardings, donate_argnums=0)(_given(cfg, shardings))
    if wrong := not_finite(state):
        raise ValueError(f"init_from: {cfg.init_from}: {wrong}")
    return state


def frozen_base(cfg: TrainConfig, shardings: TrainState):
    """TrainState.base of a run that resumes: with cfg.lora the weights of init_from, else {}.

    Raises:
      ValueError: see fresh.
    """
    if cfg.lora is None:
        return {}
    return {name: tree for name, tree in _given(cfg, shardings).items() if name != "router"}


def _given(cfg: TrainConfig, shardings: TrainState):
    """The parameters of `cfg.init_from`, and teachers' pairs; each goes straight to its place."""
    dtype = "float32" if cfg.lora is None else cfg.lora.base_dtype
    apart = (ADAPTERS, TEACHERS)
    places = {name: place for name, place in shardings.public.items() if name not in apart}
    read = functools.partial(load_onto, cfg.init_from, cfg.model, dtype, places)
    if is_run(cfg.init_from):  # all processes read it together (checkpoint/store.py)
        return read() | _teachers(cfg, shardings)
    with agreed():
        given = read()
    return given | _teachers(cfg, shardings)


def _teachers(cfg: TrainConfig, shardings: TrainState):
    """{"teachers": their pairs}, each array in its place; {} for an objective without."""
    if cfg.objective != "distill":
        return {}
    with agreed():
        pairs = teacher_pairs(cfg)
    return {TEACHERS: jax.tree.map(_placed, pairs, shardings.base[TEACHERS])}


def _placed(array: np.ndarray, place) -> jax.Array:
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])
