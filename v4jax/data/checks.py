"""Checks of values in training records: no unknown keys, no text that begins a turn.

Next file to read: v4jax/data/tools.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from v4jax.chat.tokens import ASSISTANT, BOS, EOS, LATEST_REMINDER, TASKS, USER

_READ_BESIDE = ("tools", "thinking_mode", "reasoning_effort")
"""Keys beside the messages of a record that are read."""
_MESSAGE = "make it a message, or part of one"
_LOST_BESIDE = {
    **dict.fromkeys(("system", "system_prompt", "system_message", "developer"), _MESSAGE),
    **dict.fromkeys(("instruction", "instructions", "prompt", "context", "input"), _MESSAGE),
    **dict.fromkeys(("output", "response", "completion"), _MESSAGE),
    "functions": 'call it "tools"',
    "response_format": "put it into the system message",
    "chat_template_kwargs": 'say it with "thinking_mode" and "tools"',
}
"""Keys beside the messages that would change the text, and where they belong instead."""
_TURN_TOKENS = (BOS, EOS, USER, ASSISTANT, LATEST_REMINDER, *TASKS.values())
"""Tokens that begin or end a turn; no text of a message may contain one."""


def is_empty(value: Any) -> bool:
    """Whether a value counts as absent: tables fill in keys that a record does not have."""
    return value is None or value in ("", [], {})


def is_list_of_objects(value: Any) -> TypeGuard[list[dict[str, Any]]]:
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


def unread_keys(
    record: Mapping[str, Any], columns: Sequence[str], messages: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Keys of a record of conversations that have a value and are not read.

    Args:
      columns: hold the messages.
      messages: all of them, which `training_messages` has checked.

    Raises:
      ValueError: a key whose value belongs into the text, unless a message says the same.
    """
    texts = [message.get("content") for message in messages]
    unread = []
    for key, value in record.items():
        if key in columns or key in _READ_BESIDE or is_empty(value):
            continue
        if key in _LOST_BESIDE and value not in texts:
            way = _LOST_BESIDE[key]
            beside = columns[-1]
            raise ValueError(f"got key {key!r} beside {beside}, which would be lost; {way}")
        unread.append(key)
    return unread


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, as `json.loads` takes it: object_pairs_hook=each_key_once.

    Raises:
      ValueError: a key that is there twice; json alone keeps the last one.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"got key {twice!r} twice in one object; must be there once")
    return made


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
