"""Several adapters of one base, from which each row of a batch chooses by name.

The pairs of all lie side by side under "lora", with an axis of adapters before that of ranks, and
"adapters" says the number of each by its name:

    {"lora": {group: {block: {"attn": {"wq_b": {"a": [L,I,U,R], "b": [L,U,R,O]}}}}},
     "adapters": {"sql": 0, "chat": 1}}

R is the largest rank that one of them has there. Smaller ranks, and matrices that one does not
adapt, are filled up with zeros.

Shapes: B batch, L layers, I and O rows and columns of a matrix, U adapters, R rank.

Next file to read: v4jax/adapters/read.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from v4jax.parameter_tree import ADAPTERS, NUMBERS, ROWS

BASE = -1
"""The number of a row that has no adapter."""


def together(named: Mapping[str, Any]) -> tuple[Any, dict[str, np.ndarray]]:
    """(the pairs of all, their numbers), for params["lora"] and params["adapters"].

    Args:
      named: name -> tree of pairs, NumPy float32, as load_adapter returns it.
    """
    flat: list[Any] = [dict(flatten_dict(tree)) for tree in named.values()]
    found: Any = {}
    for path in dict.fromkeys(path for tree in flat for path in tree if path[-1] == "a"):
        a, b = path, (*path[:-1], "b")
        each = [(tree.pop(a), tree.pop(b)) if a in tree else None for tree in flat]
        there = [pair for pair in each if pair is not None]
        rank = max(a_IR.shape[-1] for a_IR, _ in there)
        (*lead, rows, _), columns = there[0][0].shape, there[0][1].shape[-1]
        found[a] = np.zeros((*lead, rows, len(each), rank), np.float32)
        found[b] = np.zeros((*lead, len(each), rank, columns), np.float32)
        for n, pair in enumerate(each):
            if pair is not None:
                found[a][..., n, : pair[0].shape[-1]] = pair[0]
                found[b][..., n, : pair[1].shape[-2], :] = pair[1]
    numbers = {name: np.array(n, np.int32) for n, name in enumerate(named)}
    return unflatten_dict(found), numbers


def only(params: Any, name: str | None) -> Any:
    """The parameters with one of their adapters alone, for `forward`, `loss` and chats.

    Args:
      name: which one; None: none, the base.

    Raises:
      ValueError: no such adapter.
    """
    numbers = _numbers(params, [name])
    rest = {key: tree for key, tree in params.items() if key not in (ADAPTERS, NUMBERS)}
    if name is None:
        return rest
    return rest | {ADAPTERS: _of_number(params[ADAPTERS], numbers[0])}


@jax.jit
def _of_number(pairs: Any, number: jax.Array) -> Any:
    """One adapter's pairs of those of several."""

    def one(path, leaf):
        axis = -2 if path[-1].key == "a" else -3
        return jax.lax.dynamic_index_in_dim(leaf, number, axis, keepdims=False)

    return jax.tree_util.tree_map_with_path(one, pairs)


def with_choice(params: Any, adapters: Sequence[str | None] | None, prompts: int, rows: int) -> Any:
    """The parameters as programs of decoding take them, with the number of each row's adapter.

    Names are left out, and numbers are values: one program serves every choice.

    Args:
      adapters: a name, or None for the base, for each prompt; None where the parameters have no
        named adapters: they are returned as they are.
      rows: of the batch; those without a prompt have no adapter.

    Raises:
      ValueError: see check_choice.
    """
    check_choice(params, adapters, prompts)
    if adapters is None:
        return params
    numbers = _numbers(params, adapters)
    rest = {key: tree for key, tree in params.items() if key != NUMBERS}
    return rest | {ROWS: np.array([*numbers, *[BASE] * (rows - prompts)], np.int32)}


def check_choice(params: Any, adapters: Sequence[str | None] | None, prompts: int) -> None:
    """Raises ValueError unless each prompt names an adapter of `params`, or None for the base.

    Where they have no named adapters, no prompt may name one: `adapters` must be None.
    """
    if adapters is None and NUMBERS in params:
        raise ValueError(
            f"adapters: got none; the parameters have {_there(params)}: name one, or None for the "
            "base, for each prompt"
        )
    if adapters is None:
        return
    listed = isinstance(adapters, Sequence) and not isinstance(adapters, str)
    if not listed or len(adapters) != prompts:
        got = f"{len(adapters)} names" if listed else repr(adapters)
        raise ValueError(f"adapters: got {got}; must be one for each of {prompts} prompt(s)")
    _numbers(params, adapters)


def refuse_several(params: Any, what: str) -> None:
    """Raises ValueError if `params` have named adapters: `what` takes one, or none."""
    if NUMBERS in params:
        raise ValueError(
            f"{what}: takes one adapter; the parameters have {_there(params)}: choose with "
            "v4jax.adapters.several.only(params, NAME)"
        )


def _numbers(params: Any, adapters: Sequence[str | None]) -> list[int]:
    if NUMBERS not in params:
        raise ValueError(
            "adapters: the parameters have no named ones; load them with "
            "v4jax.load(BASE, adapter={'NAME': DIR})"
        )
    known = params[NUMBERS]
    for name in adapters:
        if name is not None and name not in tuple(known):  # it may be anything
            raise ValueError(
                f"adapters: got {name!r}; allowed: {_there(params)}, or None for the base"
            )
    return [BASE if name is None else int(known[name]) for name in adapters]


def _there(params: Any) -> str:
    return ", ".join(map(repr, params[NUMBERS]))
