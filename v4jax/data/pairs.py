"""Pairs of conversations of which one is preferred: what both begin with, and their two endings.

    {"prompt": messages, "chosen": messages, "rejected": messages}     what follows the prompt
    {"chosen": messages, "rejected": messages}                         whole conversations

With a prompt, a conversation may hold it all the same. Text stands for one message: as prompt the
user's, as answer the assistant's. Only what comes after the common beginning is learned.

A store has two documents a pair, the chosen one first. A row has them as neighbours, too: as
segments 2k + 1 and 2k + 2. So nothing that cuts a batch into rows can part them.

Axes: T tokens of one conversation.

Next file to read: v4jax/data/store.py.
"""

import itertools
import json
from typing import Any

import numpy as np

from v4jax.chat.encoding import Message
from v4jax.data.checks import is_empty, is_list_of_objects, unread_keys
from v4jax.data.config import ANSWERS, ChatFormat
from v4jax.data.conversations import conversation_tokens
from v4jax.data.documents import unit_hash
from v4jax.tokenizer import Tokenizer

_AUTHORS = {"prompt": "user"} | dict.fromkeys(ANSWERS, "assistant")
"""Key of a record -> whose message its text is."""
_ASKING = ("system", "developer", "user")
"""Roles that do not answer a prompt."""


def pair_tokens(
    record: dict[str, Any], chat: ChatFormat, tokenizer: Tokenizer
) -> tuple[list[tuple[np.ndarray, np.ndarray]], float, list[str]]:
    """([(tokens int32 [T], learned uint8 [T]) of chosen and of rejected], hash, keys not read).

    The hash is that of the common beginning, so that one prompt is on one side of the split.

    Raises:
      ValueError: conversations that `conversation_tokens` refuses, that are the same, or that first
        differ in something else than an assistant's message.
    """
    two = _conversations(record)
    shared = _common_beginning(two)
    made = []
    for name, messages in zip(ANSWERS, two, strict=True):
        # A message of weight 0 is not learned.
        begins = [{**message, "weight": 0} for message in messages[:shared]]
        whole = {key: value for key, value in record.items() if key not in _AUTHORS}
        whole["messages"] = begins + messages[shared:]
        try:
            made.append(conversation_tokens(whole, "messages", chat, tokenizer))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if np.array_equal(made[0][0], made[1][0]):
        raise ValueError("chosen and rejected become the same text")
    unread = unread_keys(record, tuple(_AUTHORS), two[0] + two[1])
    return made, unit_hash(json.dumps(two[0][:shared], sort_keys=True)), unread


def _conversations(record: dict[str, Any]) -> list[list[Message]]:
    """The whole chosen and the whole rejected conversation."""
    prompt = [] if is_empty(record.get("prompt")) else _messages(record, "prompt")
    two = []
    for name in ANSWERS:
        if isinstance(record[name], str) and not prompt:
            raise ValueError(
                f"{name}: got text without a prompt; must be a list of messages then (there are: "
                f"{', '.join(sorted(record))})"
            )
        two.append(_whole(name, prompt, _messages(record, name)))
    return two


def _whole(name: str, prompt: list[Message], found: list[Message]) -> list[Message]:
    """The conversation that `found` is, or that it goes on with after the prompt.

    Where the user or the system speaks first, after a prompt that waits for an answer, `found` is
    whole. Then the prompt must be in it, so that nothing is lost, and nothing comes twice.
    """
    if found[: len(prompt)] == prompt:
        return found
    role = found[0].get("role")
    if not prompt or prompt[-1].get("role") == "assistant" or role not in _ASKING:
        return prompt + found
    if any(message not in found for message in prompt):
        raise ValueError(
            f"{name}: begins with role {role!r} and does not hold the prompt; must be what follows "
            "the prompt, or hold it"
        )
    return found


def _messages(record: dict[str, Any], name: str) -> list[Message]:
    """The messages under a key of a record, where text is one message.

    Keys without a value are left out, as tables fill them in: equal messages compare as equal.
    """
    given = record[name]
    if isinstance(given, str):
        return [{"role": _AUTHORS[name], "content": given}]
    if not is_list_of_objects(given) or not given:
        got = "null" if given is None else "[]" if given == [] else type(given).__name__
        raise ValueError(f"{name}: got {got}; must be text, or a list of messages")
    return [
        {key: value for key, value in message.items() if key == "content" or not is_empty(value)}
        for message in given
    ]


def _common_beginning(two: list[list[Message]]) -> int:
    """How many messages the two conversations begin with alike."""
    if two[0] == two[1]:
        raise ValueError("chosen and rejected are the same")
    alike = (one == other for one, other in zip(*two, strict=False))
    shared = sum(itertools.takewhile(bool, alike))
    if not shared:
        raise ValueError("chosen and rejected begin with different messages; must share a prompt")
    for name, messages in zip(ANSWERS, two, strict=True):
        if len(messages) == shared:
            raise ValueError(f"{name}: has no answer after the {shared} message(s) of both")
    for name, messages in zip(ANSWERS, two, strict=True):
        role = messages[shared].get("role")
        if role != "assistant":
            raise ValueError(
                f"{name}: message {shared} is the first that differs and has role {role!r}; must "
                "be assistant"
            )
    return shared
