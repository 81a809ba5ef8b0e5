"""Encodes chat messages exactly as the released `encoding` module does, token for token.

    bos [effort] system | <User>text<Assistant><think>reasoning</think>answer eos | <User>text ...

- In a turn without thinking </think> replaces <think>: the block is closed before it begins.
- Tool results are part of a user turn, in the order of the calls that they answer.
- drop_thinking leaves out the reasoning, and whole developer messages, of turns before the last
  user message, unless any message declares tools.
- There is no thinking after a message with a task.

Next file to read: v4jax/chat/parse.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from v4jax.chat.dsml import render_calls, render_tools, to_json
from v4jax.chat.tokens import ASSISTANT, BOS, END_THINK, EOS, LATEST_REMINDER, TASKS, THINK, USER

Message = Mapping[str, Any]
MODES = ("chat", "thinking")
ROLES = ("system", "user", "assistant", "tool", "developer", "latest_reminder")

# Protocol text, like the tool prompt.
_THOROUGH = """Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""  # noqa: E501
_RELENTLESS = """Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the problem into its most fundamental components, trace every causal chain to its root, and resolve the underlying cause rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no assumption remains unchecked and no error remains undiscovered.

"""  # noqa: E501
EFFORTS = {
    "v4": {None: "", "high": "", "max": _THOROUGH},
    "0731": {None: "", "low": "", "high": _THOROUGH, "max": _RELENTLESS},
}
"""The text that reasoning_effort puts before the first message.

v4: V4-Flash and V4-Pro as first released; 0731: V4-Flash-0731.
"""
_SCHEMA = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"


class Span(NamedTuple):
    """Text of one author.

    Attributes:
      written: the model wrote it; its end token is included.
      current: the model wrote it after the last user message.
      place: index of the message it comes from; -1 for what opens a conversation.
    """

    text: str
    written: bool = False
    current: bool = False
    place: int = -1


class _Block(NamedTuple):
    """Part of a user turn: its text, or a tool's result with the id of its call."""

    text: str
    call: str | None


def encode_messages(messages: Sequence[Message], thinking_mode: str = "chat", **settings) -> str:
    """The text of a conversation.

    It ends ready for an answer if the last message is a user's, a developer's or a tool result.

    Example: encode_messages([{"role": "user", "content": "Hi"}]) is
    "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜></think>".

    Args: see `encode_spans`.
    """
    return "".join(span.text for span in encode_spans(messages, thinking_mode, **settings))


def encode_spans(
    messages: Sequence[Message],
    thinking_mode: str = "chat",
    *,
    context: Sequence[Message] | None = None,
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    reasoning_effort: str | None = None,
    release: str = "v4",
) -> list[Span]:
    """The text of a conversation, in spans that the model wrote and spans that it was given.

    Args:
      messages: in OpenAI's form: "role" (one of ROLES) and "content". system and developer may have
        "tools" and "response_format"; assistant "reasoning_content", "tool_calls" and "wo_eos"
        (true: to be continued); tool "tool_call_id"; any "task" (a key of TASKS).
      thinking_mode: "chat" or "thinking".
      context: messages encoded before. Only what follows them is returned, without bos. Where
        dropping removes a developer message from their middle, the first of `messages` is left out
        too, as the released code does.
      reasoning_effort: a key of EFFORTS[release]; it matters in thinking mode only.

    Raises:
      ValueError: a message or setting that the format does not have; names the message by its
        index.
    """
    if thinking_mode not in MODES:
        raise ValueError(f"thinking_mode: got {thinking_mode!r}; allowed: {', '.join(MODES)}")
    efforts = EFFORTS.get(release)
    if efforts is None or reasoning_effort not in efforts:
        known = f"release: got {release!r}; allowed: {', '.join(EFFORTS)}"
        raise ValueError(
            f"reasoning_effort: got {reasoning_effort!r}; allowed: {', '.join(map(str, efforts))}"
            if efforts
            else known
        )
    thinking, context = thinking_mode == "thinking", _merged(context or ())
    turns = _in_call_order(context + _merged(messages))
    drop = drop_thinking and not any(turn.get("tools") for turn in turns)
    if thinking and drop:
        turns, context = _without_old_developers(turns), _without_old_developers(context)
    spans = [Span(BOS)] if add_default_bos_token and not context else []
    if thinking and not context and turns and efforts[reasoning_effort]:
        spans.append(Span(efforts[reasoning_effort]))
    last_user = _last_user(turns)
    for index in range(len(context), len(turns)):
        keeps = thinking and (not drop or index >= last_user)
        written, place = turns[index]["role"] == "assistant", turns[index]["place"]
        spans.append(
            Span(_body(turns, index, keeps), written, written and index > last_user, place)
        )
        spans.append(Span(_opening(turns, index, thinking, keeps), place=place))
    return [span for span in spans if span.text]


# ---- turns ---------------------------------------------------------------------------------------


def _merged(messages: Sequence[Message]) -> list[dict]:
    """Merges consecutive tool results and user texts into one user turn, with "blocks".

    A text does not join a turn that has a task; a result does.
    """
    turns: list[dict] = []
    for place, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise ValueError(f"message {place}: got role {role!r}; allowed: {', '.join(ROLES)}")
        if message.get("task") is not None and message["task"] not in TASKS:
            raise ValueError(
                f"message {place}: got task {message['task']!r}; allowed: {', '.join(TASKS)}"
            )
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise ValueError(
                f"message {place}: got tool_calls {calls!r}; must be a list of objects"
            )
        if role not in ("tool", "user"):
            turns.append(dict(message) | {"place": place})
            continue
        blocks = [_result(message, place)] if role == "tool" else _texts(message, place)
        last: dict[str, Any] = turns[-1] if turns else {"role": None}
        if last["role"] == "user" and (role == "tool" or last["task"] is None):
            last["blocks"] += blocks
        else:
            task = message.get("task") if role == "user" else None
            turns.append({"role": "user", "task": task, "blocks": blocks, "place": place})
    return turns


def _texts(message: Message, place: int) -> list[_Block]:
    content = message.get("content", "")
    if isinstance(content, str):
        return [_Block(content, None)]
    if not isinstance(content, list) or not all(_is_text(part) for part in content):
        raise ValueError(
            f"message {place}: got content {content!r}; a user's must be text, or a list of text "
            "parts"
        )
    return [_Block(part["text"], None) for part in content]


def _result(message: Message, place: int) -> _Block:
    content = message.get("content", "")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = "\n\n".join(
            part["text"] if _is_text(part) else f"[Unsupported {part.get('type')}]"
            for part in content
        )
    if not isinstance(content, str):
        raise ValueError(
            f"message {place}: got content {content!r}; a tool's must be text, or a list of parts"
        )
    return _Block(f"<tool_result>{content}</tool_result>", message.get("tool_call_id") or "")


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _in_call_order(turns: list[dict]) -> list[dict]:
    """Sorts the tool results of a turn by the latest calls; an unknown call counts as the first."""
    order: dict[str, int] = {}
    for turn in turns:
        if turn["role"] == "assistant" and turn.get("tool_calls"):
            ids = [
                call.get("id") or (call.get("function") or {}).get("id", "")
                for call in turn["tool_calls"]
            ]
            order = {name: index for index, name in enumerate(ids) if name}
        elif turn["role"] == "user":
            results = iter(
                sorted(
                    (b for b in turn["blocks"] if b.call is not None),
                    key=lambda b: order.get(b.call, 0),
                )
            )
            turn["blocks"] = [
                block if block.call is None else next(results) for block in turn["blocks"]
            ]
    return turns


def _last_user(turns: list[dict]) -> int:
    return max(
        (index for index, turn in enumerate(turns) if turn["role"] in ("user", "developer")),
        default=-1,
    )


def _without_old_developers(turns: list[dict]) -> list[dict]:
    last = _last_user(turns)
    return [
        turn for index, turn in enumerate(turns) if turn["role"] != "developer" or index >= last
    ]


# ---- text ----------------------------------------------------------------------------------------


def _body(turns: list[dict], index: int, keeps: bool) -> str:
    """The text of a turn, without what opens the answer to it. keeps: with its reasoning."""
    turn = turns[index]
    if turn["role"] == "user":
        return USER + "\n\n".join(block.text for block in turn["blocks"])
    content = _text(turn, "content")
    if turn["role"] == "assistant":
        after_task = index > 0 and turns[index - 1].get("task") is not None
        reasoning = _text(turn, "reasoning_content") + END_THINK if keeps and not after_task else ""
        calls = "\n\n" + render_calls(turn["tool_calls"]) if turn.get("tool_calls") else ""
        return reasoning + content + calls + ("" if turn.get("wo_eos") else EOS)
    if turn["role"] != "system" and not content:
        raise ValueError(
            f"message {turn['place']}: got no content; a {turn['role']}'s must be text that is not "
            "empty"
        )
    if turn["role"] == "latest_reminder":
        return LATEST_REMINDER + content
    tools = "\n\n" + render_tools(turn["tools"]) if turn.get("tools") else ""
    schema = (
        "\n\n" + _SCHEMA + to_json(turn["response_format"]) if turn.get("response_format") else ""
    )
    return (USER if turn["role"] == "developer" else "") + content + tools + schema


def _opening(turns: list[dict], index: int, thinking: bool, keeps: bool) -> str:
    """The text that opens the answer to a turn.

    It is "" unless an answer or a reminder follows, or the turn is the last.
    """
    turn = turns[index]
    if index + 1 < len(turns) and turns[index + 1]["role"] not in ("assistant", "latest_reminder"):
        return ""
    if turn.get("task") == "action":
        return ASSISTANT + (THINK if thinking else END_THINK) + TASKS["action"]
    if turn.get("task") is not None:
        return TASKS[turn["task"]]
    if turn["role"] in ("user", "developer"):
        return ASSISTANT + (THINK if keeps else END_THINK)
    return ""


def _text(turn: dict, name: str) -> str:
    text = turn.get(name) or ""
    if not isinstance(text, str):
        raise ValueError(f"message {turn['place']}: got {name} {text!r}; must be text")
    return text
