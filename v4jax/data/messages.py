"""Turns a data set's messages into those of the format, and refuses any that would change meaning.

`encode_messages` follows the released code: it ignores keys that it does not know and encodes
messages in any order. A training run would learn the resulting text. So this module refuses
anything that would be lost, moved or misread. It turns common spellings into the format's own:

    reasoning    "reasoning_content", "reasoning", a leading part of type "thinking" or "reasoning",
                 or a leading <think>...</think> in the content; white space before
                 the tag is dropped, white space after a tag stays
    content      text, or a list of text parts, joined by an empty line
    tool calls   with or without {"type": "function", "function": ...}; arguments: an object or its
                 JSON text
    tools        likewise, or all of them as one JSON text

Keys without a value (null, "", [], {}) count as absent. What the model is given may contain
<think>, </think> and tags of tool calls, as the released tool prompt does; what it writes may not.

Next file to read: v4jax/data/conversations.py.
"""

from typing import Any

from v4jax.chat.encoding import ROLES, Message, encode_spans
from v4jax.chat.parse import parse_message
from v4jax.chat.tokens import END_THINK, TASKS, THINK
from v4jax.data.checks import check_keys, check_tokens, is_empty, is_list_of_objects
from v4jax.data.tools import check_results, declared, meaning, plain_calls, plain_tools

_KEYS = {
    "system": ("tools", "response_format"),
    "developer": ("tools", "response_format"),
    "assistant": ("reasoning_content", "reasoning", "tool_calls", "wo_eos"),
    "tool": ("tool_call_id",),
}
"""Keys that messages of each role may have, besides those of all roles."""
_KEYS_OF_ALL = ("role", "content", "task", "weight", "name")
"""Keys that all roles may have. The name is ignored: the format has no place for it."""
_VALUES = {"weight": (0, 1), "wo_eos": (False, True), "task": tuple(TASKS)}
_THOUGHTS = ("thinking", "reasoning")


def training_messages(messages: Any, tools: Any = None) -> list[Message]:
    """A record's messages, and the tools beside them, in the form that `encode_messages` takes.

    The first message declares the tools. If it is not a system or developer message, an empty
    system message goes before it.

    Raises:
      ValueError: anything that the text would lose or change; names the message by its place.
    """
    if not is_list_of_objects(messages):
        raise ValueError(f"messages: got {type(messages).__name__}; must be a list of objects")
    found = []
    for place, message in enumerate(messages):
        try:
            found.append(_message(message))
        except ValueError as error:
            raise ValueError(f"message {place}: {error}") from None
    check_results(found)
    try:
        return declared(found, plain_tools(tools))
    except ValueError as error:
        raise ValueError(f"tools: {error}") from None


def _message(message: dict[str, Any]) -> Message:
    """One message of a record in the format's form.

    Raises:
      ValueError: names the key or value, what was got and what is allowed.
    """
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"got role {role!r}; allowed: {', '.join(ROLES)}")
    given = {key: value for key, value in message.items() if not is_empty(value)}
    check_keys(given, (*_KEYS_OF_ALL, *_KEYS.get(role, ())), f"{role} messages")
    for key, allowed in _VALUES.items():
        if key in given and given[key] not in allowed:
            raise ValueError(f"got {key} {given[key]!r}; allowed: {', '.join(map(str, allowed))}")
    check_tokens(given)
    if "tools" in given:
        given["tools"] = plain_tools(given["tools"])
    if message.get("content") is None and role != "system" and "tool_calls" not in given:
        raise ValueError(f"got no content; messages of role {role} must have one")
    if role == "assistant":
        return _answer(given)
    content = given.get("content", "")
    if role in ("developer", "latest_reminder") and not content:
        raise ValueError(f"got content {content!r}; that of role {role} must not be empty")
    # Parts of a tool's result may have any type: the format has a text for those it cannot show.
    if role != "tool" or not is_list_of_objects(content):
        given["content"] = "\n\n".join(_texts(content))
    return given


def _texts(content: Any) -> list[str]:
    """The texts of a content, which is text or a list of text parts."""
    if isinstance(content, str):
        return [content]
    if not is_list_of_objects(content):
        raise ValueError(f"got content {content!r}; must be text, or a list of parts")
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"got a part of type {part.get('type')!r} in the content; allowed here: text"
            )
        check_keys(part, ("type", "text"), "text parts")
    return [part["text"] for part in content]


def _answer(given: dict[str, Any]) -> Message:
    """An assistant's message, with its reasoning under the format's one name."""
    thoughts = [given[key] for key in ("reasoning_content", "reasoning") if key in given]
    parts = given.get("content", "")
    if is_list_of_objects(parts) and parts[0].get("type") in _THOUGHTS:
        thoughts.append(_thought(parts[0]))
        parts = parts[1:]
    content = "\n\n".join(_texts(parts))
    for thought in thoughts:
        if not isinstance(thought, str):
            raise ValueError(f"got reasoning {thought!r}; must be text")
    if THINK in content or END_THINK in content:
        inner, content = _split(content)
        if thoughts:
            raise ValueError(
                f"got {THINK} in the content beside reasoning of its own; allowed: one of them"
            )
        thoughts = [inner]
    if len(set(thoughts)) > 1:
        raise ValueError(
            "got reasoning twice, and not the same; "
            "allowed: one of reasoning_content, reasoning, a part"
        )
    rest = {key: value for key, value in given.items() if key != "reasoning"}
    answer = rest | {"content": content, "reasoning_content": thoughts[0] if thoughts else ""}
    if "tool_calls" in given:
        answer["tool_calls"] = plain_calls(given["tool_calls"])
    _check_read_back(answer)
    return answer


def _thought(part: dict[str, Any]) -> Any:
    """The reasoning in a part such as {"type": "thinking", "thinking": ...}; ignores signatures."""
    texts = {
        key: value
        for key, value in part.items()
        if key not in ("type", "signature") and not is_empty(value)
    }
    check_keys(texts, (*_THOUGHTS, "text"), f"parts of type {part['type']!r}")
    if len(texts) != 1:
        raise ValueError(
            f"got a part of type {part['type']!r} with {len(texts)} texts; must have one"
        )
    return next(iter(texts.values()))


def _split(content: str) -> tuple[str, str]:
    """(reasoning, the rest) of a content that begins with <think>reasoning</think>.

    White space before it is left out: the format has no place for it.
    """
    head, _, rest = content.lstrip().partition(END_THINK)
    inner = head.removeprefix(THINK)
    if content.count(THINK) != 1 or content.count(END_THINK) != 1 or not head.startswith(THINK):
        raise ValueError(
            f"got {THINK} or {END_THINK} in the content; "
            f"allowed: one {THINK}...{END_THINK} at its beginning"
        )
    return inner, rest


def _check_read_back(answer: Message) -> None:
    """Raises ValueError for an answer that would be read back as a different one.

    The format escapes nothing: a closing tag in an argument ends the argument. Reading the answer
    back is the one check that finds all such texts.
    """
    plain = {
        key: answer[key]
        for key in ("role", "content", "reasoning_content", "tool_calls")
        if key in answer
    }
    spans = encode_spans([{"role": "user", "content": ""}, plain], "thinking", drop_thinking=False)
    try:
        found = parse_message("".join(span.text for span in spans if span.written), "thinking")
    except ValueError as error:
        raise ValueError(f"the text of it could not be read back: {error}") from None
    for key in ("reasoning_content", "content"):
        if found[key] != answer[key]:
            raise ValueError(f"{key} would be read back as {found[key]!r}, got {answer[key]!r}")
    told = [meaning(call) for call in answer.get("tool_calls", ())]
    read = [meaning(call) for call in found["tool_calls"]]
    if told != read:
        raise ValueError(f"tool_calls would be read back as {read!r}, got {told!r}")
