"""Messages of data sets as messages of the format, checked: what is learned is what was meant.

`encode_messages` follows the released code. It leaves out keys that it does not know and gives some text for any order of
messages. A training run would learn that text, so here everything that would be lost, moved or misread is refused, and
the common spellings of one thing are brought to the one that the format has:

    reasoning       "reasoning_content", "reasoning", a leading part of type "thinking" or "reasoning", or a leading
                    <think>...</think> in the content, to the letter: white space around it stays
    content         text, or a list of text parts, joined by an empty line
    tool calls      with or without {"type": "function", "function": ...}; arguments an object or its JSON text
    tools           likewise, or all of them as one JSON text

Keys without a value (null, "", [], {}) count as absent: tables fill what a record does not have with null. <think>,
</think> and tags of tool calls may be in what the model is given, as in the released tool prompt, but not in what it writes.

Next file to read: v4jax/data/conversations.py.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from v4jax.chat.dsml import from_json
from v4jax.chat.encoding import ROLES, Message, encode_spans
from v4jax.chat.parse import parse_message
from v4jax.chat.tokens import ASSISTANT, BOS, END_THINK, EOS, LATEST_REMINDER, TASKS, THINK, USER

_KEYS = {
    "system": ("tools", "response_format"),
    "developer": ("tools", "response_format"),
    "assistant": ("reasoning_content", "reasoning", "tool_calls", "wo_eos"),
    "tool": ("tool_call_id",),
}
"""Keys that are read of each role's messages, beside those of all roles."""
_KEYS_OF_ALL = ("role", "content", "task", "weight", "name")
"""A name is known and not shown: the format has no place for it."""
_TURN_TOKENS = (BOS, EOS, USER, ASSISTANT, LATEST_REMINDER, *TASKS.values())
"""Tokens that begin or end a turn, which no text of a message may spell out."""
_OUTER = ("id", "type", "index")
"""What a tool or a call has beside "function"."""
_VALUES = {"weight": (0, 1), "wo_eos": (False, True), "task": tuple(TASKS)}
_THOUGHTS = ("thinking", "reasoning")


def training_messages(messages: Any, tools: Any = None) -> list[Message]:
    """The messages of a record, and the tools it declares beside them, as `encode_messages` takes them.

    The first message declares the tools; where it is no system or developer message, one is put before it.

    Raises:
      ValueError: anything that the text of the conversation would lose or change; names the message by its place.
    """
    if not _is_list_of_objects(messages):
        raise ValueError(f"messages: got {type(messages).__name__}; must be a list of objects")
    found = []
    for place, message in enumerate(messages):
        try:
            found.append(_message(message))
        except ValueError as error:
            raise ValueError(f"message {place}: {error}") from None
    _check_results(found)
    try:
        return _declared(found, _tools(tools))
    except ValueError as error:
        raise ValueError(f"tools: {error}") from None


def _message(message: dict[str, Any]) -> Message:
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"got role {role!r}; allowed: {', '.join(ROLES)}")
    given = {key: value for key, value in message.items() if not _is_empty(value)}
    _check_keys(given, (*_KEYS_OF_ALL, *_KEYS.get(role, ())), f"{role} messages")
    for key, allowed in _VALUES.items():
        if key in given and given[key] not in allowed:
            raise ValueError(f"got {key} {given[key]!r}; allowed: {', '.join(map(str, allowed))}")
    _check_tokens(given)
    if "tools" in given:
        given["tools"] = _tools(given["tools"])
    if message.get("content") is None and role != "system" and "tool_calls" not in given:
        raise ValueError(f"got no content; messages of role {role} must have one")
    if role == "assistant":
        return _answer(given)
    content = given.get("content", "")
    if role in ("developer", "latest_reminder") and not content:
        raise ValueError(f"got content {content!r}; that of role {role} must not be empty")
    # Parts of a tool's result may be of any type: the format has a text for those that it cannot show.
    if role != "tool" or not _is_list_of_objects(content):
        given["content"] = "\n\n".join(_texts(content))
    return given


def _is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {})


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, dict) for part in value)


def _check_keys(given: Iterable[str], known: tuple[str, ...], what: str) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"got key {key!r}, which would be lost; {what} may have {', '.join(known)}")


def _check_tokens(value: Any) -> None:
    """Refuses texts, at any depth, in which a tokenizer would find the beginning or end of a turn."""
    for text in _strings(value):
        for token in _TURN_TOKENS:
            if token in text:
                raise ValueError(f"got {token} in a text, which would begin or end a turn; each turn must be a message")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings([*value, *value.values()])
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


# ---- content and reasoning -------------------------------------------------------------------------------------------


def _texts(content: Any) -> list[str]:
    """The texts of a content that is text, or a list of text parts."""
    if isinstance(content, str):
        return [content]
    if not _is_list_of_objects(content):
        raise ValueError(f"got content {content!r}; must be text, or a list of parts")
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"got a part of type {part.get('type')!r} in the content; allowed here: text")
        _check_keys([key for key, value in part.items() if not _is_empty(value)], ("type", "text"), "text parts")
    return [part["text"] for part in content]


def _answer(given: dict[str, Any]) -> Message:
    """An assistant's message, with its reasoning under the one name that the format has."""
    thoughts = [given[key] for key in ("reasoning_content", "reasoning") if key in given]
    parts = given.get("content", "")
    if _is_list_of_objects(parts) and parts[0].get("type") in _THOUGHTS:
        thoughts.append(_thought(parts[0]))
        parts = parts[1:]
    content = "\n\n".join(_texts(parts))
    for thought in thoughts:
        if not isinstance(thought, str):
            raise ValueError(f"got reasoning {thought!r}; must be text")
    if THINK in content or END_THINK in content:
        inner, content = _split(content)
        if thoughts:
            raise ValueError(f"got {THINK} in the content beside reasoning of its own; allowed: one of them")
        thoughts = [inner]
    if len(set(thoughts)) > 1:
        raise ValueError("got reasoning twice, and not the same; allowed: one of reasoning_content, reasoning, a part")
    rest = {key: value for key, value in given.items() if key != "reasoning"}
    answer = rest | {"content": content, "reasoning_content": thoughts[0] if thoughts else ""}
    if "tool_calls" in given:
        answer["tool_calls"] = _calls(given["tool_calls"])
    _check_read_back(answer)
    return answer


def _thought(part: dict[str, Any]) -> Any:
    """The reasoning in a part such as {"type": "thinking", "thinking": ...}; a signature of it is left out."""
    texts = {key: value for key, value in part.items() if key not in ("type", "signature") and not _is_empty(value)}
    _check_keys(texts, (*_THOUGHTS, "text"), f"parts of type {part['type']!r}")
    if len(texts) != 1:
        raise ValueError(f"got a part of type {part['type']!r} with {len(texts)} texts; must have one")
    return next(iter(texts.values()))


def _split(content: str) -> tuple[str, str]:
    """(reasoning, the rest) of a content that begins with <think>reasoning</think>."""
    head, _, rest = content.partition(END_THINK)
    inner = head.removeprefix(THINK)
    if content.count(THINK) != 1 or content.count(END_THINK) != 1 or not head.startswith(THINK):
        raise ValueError(f"got {THINK} or {END_THINK} in the content; allowed: one {THINK}...{END_THINK} at its beginning")
    return inner, rest


# ---- tools -----------------------------------------------------------------------------------------------------------


def _tools(tools: Any) -> list[dict]:
    """Tools as {"type": "function", "function": {...}}."""
    if isinstance(tools, str) and tools:
        try:
            tools = from_json(tools)
        except ValueError as error:
            raise ValueError(f"got tools {tools!r}, which are not JSON: {error}") from None
    if _is_empty(tools):
        return []
    if not _is_list_of_objects(tools):
        raise ValueError(f"got tools {tools!r}; must be a list of objects, or its JSON text")
    _check_tokens(tools)
    return [_wrapped(tool) for tool in tools]


def _calls(calls: Any) -> list[dict]:
    """Tool calls as {"type": "function", "function": {"name": ..., "arguments": ...}}."""
    if not _is_list_of_objects(calls):
        raise ValueError(f"got tool_calls {calls!r}; must be a list of objects")
    calls = [_wrapped(call) for call in calls]
    for call in calls:
        function = call["function"]
        named = [key for key, part in function.items() if not _is_empty(part)]
        _check_keys(named, ("name", "arguments", "id"), "functions of tool calls")
        arguments = function.get("arguments")
        try:
            good = isinstance(arguments if isinstance(arguments, dict) else from_json(arguments), dict)
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"got arguments {arguments!r}; must be an object, or its JSON text")
    return calls


def _wrapped(value: dict[str, Any]) -> dict[str, Any]:
    """A tool or a call with what describes the function below "function"."""
    if value.get("type", "function") not in ("function", None):
        raise ValueError(f"got a tool or call of type {value['type']!r}; allowed: function")
    outer = {key: part for key, part in value.items() if key in _OUTER and not _is_empty(part)}
    inner = {key: part for key, part in value.items() if key not in _OUTER}
    if isinstance(inner.get("function"), dict):
        beside = [key for key, part in inner.items() if not _is_empty(part)]
        _check_keys(beside, ("function", *_OUTER), "tools and tool calls")
        inner = inner["function"]
    if not isinstance(inner.get("name"), str):
        raise ValueError(f'got {value!r}; must be {{"type": "function", "function": {{"name": ...}}}}')
    return outer | {"type": "function", "function": inner}


def _check_read_back(answer: Message) -> None:
    """Refuses an answer that would be read back as another one, for example for a closing tag within an argument.

    The format escapes nothing, so reading back is the one check that holds for all of them.
    """
    plain = {key: answer[key] for key in ("role", "content", "reasoning_content", "tool_calls") if key in answer}
    spans = encode_spans([{"role": "user", "content": ""}, plain], "thinking", drop_thinking=False)
    try:
        found = parse_message("".join(span.text for span in spans if span.written), "thinking")
    except ValueError as error:
        raise ValueError(f"the text of it could not be read back: {error}") from None
    for key in ("reasoning_content", "content"):
        if found[key] != answer[key]:
            raise ValueError(f"{key} would be read back as {found[key]!r}, got {answer[key]!r}")
    told = [_meaning(call) for call in answer.get("tool_calls", ())]
    read = [_meaning(call) for call in found["tool_calls"]]
    if told != read:
        raise ValueError(f"tool_calls would be read back as {read!r}, got {told!r}")


def _meaning(call: dict[str, Any]) -> tuple[str, dict]:
    arguments = call["function"]["arguments"]
    return call["function"]["name"], arguments if isinstance(arguments, dict) else from_json(arguments)


def _check_results(messages: list[Message]) -> None:
    """Refuses a tool's result that answers no call of the assistant's latest message."""
    calls: list[dict] = []
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            calls = message.get("tool_calls", [])
        if message["role"] != "tool":
            continue
        if not calls:
            raise ValueError(f"message {place}: a tool message, but the assistant's latest message calls no tool")
        ids = [name for call in calls if (name := call.get("id") or call["function"].get("id"))]
        asked = message.get("tool_call_id")
        if ids and asked is not None and asked not in ids:
            raise ValueError(f"message {place}: got tool_call_id {asked!r}; the latest calls are {', '.join(map(str, ids))}")


def _declared(messages: list[Message], tools: list[dict]) -> list[Message]:
    """Messages whose first one declares the tools."""
    if not tools:
        return messages
    if not messages or messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": "", "tools": tools}, *messages]
    if messages[0].get("tools", tools) != tools:
        raise ValueError("got some in the record and others in message 0; allowed: one of them")
    return [messages[0] | {"tools": tools}, *messages[1:]]
