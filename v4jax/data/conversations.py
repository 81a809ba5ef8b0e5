"""Conversations as tokens, with a mark on those to be learned: what an assistant wrote.

An answer's reasoning, </think>, content, tool calls and end token are learned. Its opening is not
(<Assistant> and <think>, or </think> if the turn does not think), because a server puts it into
the prompt.

Axes: T tokens of one conversation.

Next file to read: v4jax/data/store.py.
"""

import itertools
from typing import Any

import numpy as np

from v4jax.chat.encoding import Message, Span, encode_spans
from v4jax.chat.tokens import ASSISTANT, END_THINK, TASKS, THINK
from v4jax.data.config import ChatFormat
from v4jax.data.messages import training_messages
from v4jax.tokenizer import Tokenizer
from v4jax.tokenizer.checks import check_no_image

_OPENINGS = (ASSISTANT + THINK, ASSISTANT + END_THINK, *TASKS.values())
"""Text that ends with one of these opens an answer."""


def conversation_tokens(
    record: dict[str, Any], column: str, chat: ChatFormat, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [T], learned uint8 [T]) of one record.

    The record has its messages in `column`, and optionally "tools", "thinking_mode" and
    "reasoning_effort" (null: absent). Weights of 0 and train_on may leave nothing to learn.

    Raises:
      ValueError: messages that `training_messages` refuses, no answer, or an answer without an
        opening.
    """
    messages = training_messages(record[column], record.get("tools"))
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("messages: no assistant message to learn from")
    mode, effort = record.get("thinking_mode"), record.get("reasoning_effort")
    spans = encode_spans(
        messages,
        chat.thinking_mode if mode is None else mode,
        drop_thinking=chat.drop_thinking,
        reasoning_effort=chat.reasoning_effort if effort is None else effort,
        release=chat.wording,
    )
    check_no_image(tokenizer, "".join(span.text for span in spans))
    _check_openings(spans, len(messages) - len(record[column]))
    ids, learned = [], []
    # Spans meet at special tokens, so a span alone has the same tokens as in the whole text.
    for wanted, run in itertools.groupby(spans, key=lambda span: _is_learned(span, messages, chat)):
        part = tokenizer.encode("".join(span.text for span in run))
        ids += part
        learned += [wanted] * len(part)
    return np.array(ids, np.int32), np.array(learned, np.uint8)


def _is_learned(span: Span, messages: list[Message], chat: ChatFormat) -> bool:
    """Whether a span is the assistant's and not left out by train_on or by weight 0."""
    return (
        span.written
        and (span.current or chat.train_on == "all")
        and bool(messages[span.place].get("weight", 1))
    )


def _check_openings(spans: list[Span], added: int) -> None:
    """Raises ValueError for an answer without an opening, or an opening without an answer.

    The released code encodes messages in any order. But an answer after a system message follows no
    <Assistant>, and no server will ever ask for one there.

    Args:
      added: how many messages were put before those of the record.
    """
    for before, span in itertools.pairwise(spans):
        opened = not before.written and before.text.endswith(_OPENINGS)
        if span.written and not opened:
            raise ValueError(
                f"message {span.place - added}: this assistant message would not follow "
                f"{ASSISTANT}; it must come right after a user, developer or tool message "
                "(drop_thinking leaves out old developer messages)"
            )
        if opened and not span.written:
            raise ValueError(
                f"message {span.place - added}: comes where an assistant message must be"
            )
