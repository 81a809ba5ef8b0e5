"""Tools, calls and results of training records, in the format's one form.

Next file to read: v4jax/data/messages.py.
"""

from typing import Any

from v4jax.chat.dsml import from_json
from v4jax.chat.encoding import Message
from v4jax.data.checks import check_keys, check_tokens, each_key_once, is_empty, is_list_of_objects

_OUTER = ("id", "type", "index")
"""Keys that a tool or a call may have beside "function"."""


def plain_tools(tools: Any) -> list[dict]:
    """Tools as {"type": "function", "function": {...}}; [] for an empty value.

    Raises:
      ValueError: tools of another form, or with a token that begins or ends a turn.
    """
    if isinstance(tools, str) and tools:
        try:
            tools = from_json(tools, each_key_once)
        except ValueError as error:
            raise ValueError(f"got tools {tools!r}, which are not JSON: {error}") from None
    if is_empty(tools):
        return []
    if not is_list_of_objects(tools):
        raise ValueError(f"got tools {tools!r}; must be a list of objects, or its JSON text")
    check_tokens(tools)
    return [_wrapped(tool) for tool in tools]


def plain_calls(calls: Any) -> list[dict]:
    """Tool calls as {"type": "function", "function": {"name": ..., "arguments": ...}}.

    Raises:
      ValueError: calls of another form, with other keys, or with arguments that are no object.
    """
    if not is_list_of_objects(calls):
        raise ValueError(f"got tool_calls {calls!r}; must be a list of objects")
    return [_with_arguments(_wrapped(call)) for call in calls]


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """The call, checked; a call without arguments has those of no parameter, {}."""
    function = call["function"]
    check_keys(function, ("name", "arguments", "id"), "functions of tool calls")
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        return call | {"function": function | {"arguments": {}}}
    must = f"got arguments {arguments!r}; must be an object, or its JSON text"
    try:
        value = _value(arguments)
    except ValueError as error:
        raise ValueError(f"{must} ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(must)
    return call


def _wrapped(value: dict[str, Any]) -> dict[str, Any]:
    """A tool or a call, with everything that describes the function under "function"."""
    if value.get("type", "function") not in ("function", None):
        raise ValueError(f"got a tool or call of type {value['type']!r}; allowed: function")
    outer = {key: part for key, part in value.items() if key in _OUTER and not is_empty(part)}
    inner = {key: part for key, part in value.items() if key not in _OUTER}
    if isinstance(inner.get("function"), dict):
        check_keys(inner, ("function", *_OUTER), "tools and tool calls")
        inner = inner["function"]
    if not isinstance(inner.get("name"), str):
        raise ValueError(
            f'got {value!r}; must be {{"type": "function", "function": {{"name": ...}}}}'
        )
    return outer | {"type": "function", "function": inner}


def meaning(call: dict[str, Any]) -> tuple[str, Any]:
    """(name, arguments as a value) of a call: equal for calls that mean the same."""
    return call["function"]["name"], _value(call["function"]["arguments"])


def _value(arguments: Any) -> Any:
    """Arguments as a value, whether they come as an object or as JSON text."""
    return arguments if isinstance(arguments, dict) else from_json(arguments, each_key_once)


def check_results(messages: list[Message]) -> None:
    """Raises ValueError for a tool's result that matches no call of the latest answer."""
    calls: list[dict] = []
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            calls = message.get("tool_calls", [])
        if message["role"] != "tool":
            continue
        if not calls:
            raise ValueError(
                f"message {place}: a tool message, but the assistant's latest message calls no tool"
            )
        ids = [name for call in calls if (name := call.get("id") or call["function"].get("id"))]
        asked = message.get("tool_call_id")
        if ids and asked is not None and asked not in ids:
            raise ValueError(
                f"message {place}: got tool_call_id {asked!r}; "
                f"the latest calls are {', '.join(map(str, ids))}"
            )


def declared(messages: list[Message], tools: list[dict]) -> list[Message]:
    """The messages, with the tools declared in the first one.

    Raises:
      ValueError: the first message declares other tools.
    """
    if not tools:
        return messages
    if not messages or messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": "", "tools": tools}, *messages]
    if messages[0].get("tools", tools) != tools:
        raise ValueError("got some in the record and others in message 0; allowed: one of them")
    return [{**messages[0], "tools": tools}, *messages[1:]]
