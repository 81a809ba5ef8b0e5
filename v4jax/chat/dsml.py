"""Writes tools and tool calls as DSML text, and parses calls back.

A call is written, inside a block, as

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="weather">
    <｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>
    <｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

Strings are written unchanged, everything else as JSON. Nothing is escaped: the format has no
escape.

Next file to read: v4jax/chat/encoding.py.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from v4jax.chat.tokens import DSML, END_THINK, THINK

BLOCK, INVOKE, PARAMETER = f"{DSML}tool_calls", f"{DSML}invoke", f"{DSML}parameter"
BLOCK_BEGIN = f"\n\n<{BLOCK}"
"""What ends the content of an answer that calls tools."""

# Protocol text: released models were trained on it to the letter.
_TOOLS = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "<{BLOCK}>" block like the following:

<{BLOCK}>
<{INVOKE} name="$TOOL_NAME">
<{PARAMETER} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{PARAMETER}>
...
</{INVOKE}>
<{INVOKE} name="$TOOL_NAME2">
...
</{INVOKE}>
</{BLOCK}>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning inside {THINK}...{END_THINK} BEFORE any tool calls or final response.

Otherwise, output directly after {END_THINK} with tool calls or final response.

### Available Tool Schemas

@SCHEMAS@

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""  # noqa: E501


def to_json(value: Any) -> str:
    """JSON with every character unescaped, as the format has it.

    Raises:
      ValueError: a value that JSON cannot express.
    """
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise ValueError(f"got {value!r}: {error}") from None


def from_json(text: Any, made_of: Callable[[list], Any] | None = None) -> Any:
    """Parses JSON text.

    Args:
      made_of: makes an object of its list of (key, value) pairs; None: a dict.

    Raises:
      ValueError: not text, not JSON, or NaN or Infinity, which Python accepts and JSON does not.
    """
    if not isinstance(text, str):
        raise ValueError(f"got {type(text).__name__}; must be JSON text")
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=made_of)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"got {name}; JSON has no such number")


def render_tools(tools: list[dict]) -> str:
    """The tool prompt of tools in OpenAI's form, one schema per line.

    Args:
      tools: objects {"type": "function", "function": {...}}.

    Raises:
      ValueError: a tool without "function".
    """
    if not isinstance(tools, list) or not all(
        isinstance(tool, dict) and "function" in tool for tool in tools
    ):
        raise ValueError(
            f'tools: got {tools!r}; must be a list of {{"type": "function", "function": {{...}}}}'
        )
    return _TOOLS.replace("@SCHEMAS@", "\n".join(to_json(tool["function"]) for tool in tools))


def render_calls(calls: list[dict]) -> str:
    """The DSML block of tool calls in OpenAI's form.

    Args:
      calls: objects {"function": {"name": ..., "arguments": JSON text}}. Arguments may also be the
        object itself instead of its JSON text.

    Raises:
      ValueError: a call without name or arguments, or arguments that are JSON but not an object.
    """
    invokes = [
        f'<{INVOKE} name="{name}">\n{_parameters(arguments)}\n</{INVOKE}>'
        for name, arguments in map(_call, calls)
    ]
    return f"<{BLOCK}>\n" + "\n".join(invokes) + f"\n</{BLOCK}>"


def _call(call: dict) -> tuple[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if (
        not isinstance(function, dict)
        or not isinstance(function.get("name"), str)
        or "arguments" not in function
    ):
        raise ValueError(
            f"tool_calls: got {call!r}; must be "
            f'{{"function": {{"name": ..., "arguments": JSON text}}}}'
        )
    return function["name"], function["arguments"]


def _parameters(arguments: Any) -> str:
    """One line per parameter. What is no JSON text is one parameter "arguments", as released."""
    if isinstance(arguments, Mapping):
        arguments = to_json(dict(arguments))
    try:
        values = json.loads(arguments)
    except (TypeError, ValueError):
        values = {"arguments": arguments}
    if not isinstance(values, dict):
        raise ValueError(
            f"tool_calls: got arguments {arguments!r}; must be the JSON text of an object"
        )
    return "\n".join(
        f'<{PARAMETER} name="{name}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else to_json(value)}</{PARAMETER}>"
        for name, value in values.items()
    )


def parse_calls(text: str, begin: int) -> tuple[list[dict], int]:
    """Parses the block of tool calls whose BLOCK_BEGIN ends at `begin`.

    Returns:
      Tool calls in OpenAI's form, and the index after the block.

    Raises:
      ValueError: anything that `render_calls` does not write; says what was found and what was
        expected.
    """
    calls = []
    while True:
        gap, tag, begin = _until(text, begin, f"<{INVOKE}", f"</{BLOCK}>")
        _expect(gap, ">\n", "between tool calls")
        if tag == f"</{BLOCK}>":
            return calls, begin
        head, tag, begin = _until(text, begin, f"<{PARAMETER}", f"</{INVOKE}")
        name = re.fullmatch(r'\s*name="(.*?)">\n\n?', head, re.DOTALL)
        if name is None:
            raise ValueError(
                f'tool call: got {head!r}; expected name="...">, a line end, then parameters'
            )
        values: dict[str, str] = {}
        while tag == f"<{PARAMETER}":
            key, value, begin = _parameter(text, begin)
            if key in values:
                raise ValueError(f"tool call: {name[1]} has parameter {key!r} twice")
            values[key] = value
            gap, tag, begin = _until(text, begin, f"<{PARAMETER}", f"</{INVOKE}")
            _expect(gap, ">\n", "after a parameter")
        arguments = ", ".join(f"{to_json(key)}: {value}" for key, value in values.items())
        calls.append(
            {"type": "function", "function": {"name": name[1], "arguments": f"{{{arguments}}}"}}
        )


def _parameter(text: str, begin: int) -> tuple[str, str, int]:
    """(name, value as JSON text, index after the name of its closing tag)."""
    body, _, begin = _until(text, begin, f"/{PARAMETER}")
    match = re.fullmatch(r' name="(.*?)" string="(true|false)">(.*?)<', body, re.DOTALL)
    if match is None:
        raise ValueError(
            f'tool call: got parameter {body!r}; expected name="..." string="true|false">value<'
        )
    key, is_string, value = match.groups()
    if is_string == "true":
        return key, to_json(value), begin
    try:
        from_json(value)
    except ValueError:
        raise ValueError(
            f'tool call: parameter {key!r} is {value!r}; with string="false" it must be JSON'
        ) from None
    return key, value, begin


def _until(text: str, begin: int, *stops: str) -> tuple[str, str, int]:
    """(text before the first of `stops`, that stop, index after it)."""
    found = [(at, stop) for stop in stops if (at := text.find(stop, begin)) >= 0]
    if not found:
        raise ValueError(
            f"tool call: got {text[begin:]!r} to the end; expected {' or '.join(map(repr, stops))}"
        )
    at, stop = min(found)
    return text[begin:at], stop, at + len(stop)


def _expect(got: str, wanted: str, where: str) -> None:
    if got != wanted:
        raise ValueError(f"tool call: got {got!r} {where}; expected {wanted!r}")
