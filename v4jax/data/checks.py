"""Checks of values in training records: no unknown keys, no text that begins a turn.

Next file to read: v4jax/data/tools.py.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from v4jax.chat.tokens import ASSISTANT, BOS, EOS, LATEST_REMINDER, TASKS, USER

_TURN_TOKENS = (BOS, EOS, USER, ASSISTANT, LATEST_REMINDER, *TASKS.values())
"""Tokens that begin or end a turn; no text of a message may contain one."""


def is_empty(value: Any) -> bool:
    """Whether a value counts as absent: tables fill in keys that a record does not have."""
    return value is None or value in ("", [], {})


def is_list_of_objects(value: Any) -> bool:
    """Whether a JSON value is a list of objects; an empty list counts."""
    return isinstance(value, list) and all(isinstance(part, dict) for part in value)


def check_keys(given: Mapping[str, Any], known: tuple[str, ...], what: str) -> None:
    """Raises ValueError for a key, unless its value is empty, that is not among the `known` ones.

    Args:
      what: who may have these keys, for the message.
    """
    for key, value in given.items():
        if key not in known and not is_empty(value):
            raise ValueError(
                f"got key {key!r}, which would be lost; {what} may have {', '.join(known)}"
            )


def check_tokens(value: Any) -> None:
    """Raises ValueError if a text at any depth contains a token that begins or ends a turn."""
    for text in _strings(value):
        for token in _TURN_TOKENS:
            if token in text:
                raise ValueError(
                    f"got {token} in a text, which would begin or end a turn; "
                    "each turn must be a message"
                )


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings([*value, *value.values()])
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
