"""Conversations as tokens, with a mark on those that are learned: what an assistant wrote, and nothing else.

Learned are an answer's reasoning, </think>, content, tool calls and end token; not what opens the answer (<Assistant> and
<think>, or </think> where the turn does not think), which a server puts into the prompt.

Axes: T tokens of one conversation.

Next file to read: v4jax/data/store.py.
"""

import itertools
import json
from typing import Any

import numpy as np

from v4jax.chat.encoding import Message, Span, encode_spans
from v4jax.data.config import ChatFormat
from v4jax.tokenizer import Tokenizer


def conversation_tokens(record: dict[str, Any], column: str, chat: ChatFormat, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [T], learned uint8 [T]) of one record.

    The record has its messages in `column`, and perhaps "tools" (declared by the first message, a system message if it
    is none already), "thinking_mode" and "reasoning_effort".

    Raises:
      ValueError: messages that break the format, or none to learn from.
    """
    messages = with_tools(record[column], record.get("tools"))
    _check_arguments(messages)
    spans = encode_spans(
        messages, record.get("thinking_mode", chat.thinking_mode), drop_thinking=chat.drop_thinking,
        reasoning_effort=record.get("reasoning_effort", chat.reasoning_effort), release=chat.release,
    )  # fmt: skip
    ids, learned = [], []
    # Spans meet at special tokens, so that tokens of a span alone are its tokens in the whole text.
    for wanted, run in itertools.groupby(spans, key=lambda span: _is_learned(span, messages, chat)):
        part = tokenizer.encode("".join(span.text for span in run))
        ids += part
        learned += [wanted] * len(part)
    if not any(learned):
        raise ValueError("messages: no assistant message to learn from")
    return np.array(ids, np.int32), np.array(learned, np.uint8)


def with_tools(messages: Any, tools: Any) -> list[Message]:
    """Messages whose first one declares the tools."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"messages: got {type(messages).__name__}; must be a list of objects")
    if not tools:
        return messages
    if messages and messages[0].get("role") in ("system", "developer"):
        return [messages[0] | {"tools": tools}, *messages[1:]]
    return [{"role": "system", "content": "", "tools": tools}, *messages]


def _is_learned(span: Span, messages: list[Message], chat: ChatFormat) -> bool:
    return span.written and (span.current or chat.train_on == "all") and bool(messages[span.place].get("weight", 1))


def _check_arguments(messages: list[Message]) -> None:
    """The format takes any arguments; in training data, what is not the JSON text of an object is a mistake."""
    for place, message in enumerate(messages):
        for call in message.get("tool_calls") or []:
            function = call.get("function") if isinstance(call, dict) else None
            arguments = function.get("arguments") if isinstance(function, dict) else None
            try:
                good = isinstance(json.loads(arguments), dict)
            except (TypeError, ValueError):
                good = False
            if not good:
                raise ValueError(f"message {place}: got arguments {arguments!r}; must be the JSON text of an object")
