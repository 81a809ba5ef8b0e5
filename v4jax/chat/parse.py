"""Parses the model's text into a message: the inverse of encoding an assistant turn.

Next file to read: v4jax/data/config.py.
"""

from typing import Any

from v4jax.chat.dsml import BLOCK_BEGIN, parse_calls
from v4jax.chat.encoding import MODES
from v4jax.chat.tokens import BOS, DSML, END_THINK, EOS, THINK


def parse_message(text: str, thinking_mode: str = "chat") -> dict[str, Any]:
    """The assistant message of a text generated after a prompt of `encode_messages`.

    Only after tool calls may the end token be missing.

    Example: parse_message("Easy.</think>4<｜end▁of▁sentence｜>", "thinking") ==
    {"role": "assistant", "content": "4", "reasoning_content": "Easy.", "tool_calls": []}.

    Args:
      thinking_mode: the mode of the prompt, "chat" or "thinking".

    Raises:
      ValueError: text that no message encodes to: an unfinished part, a tag out of place, a special
        token in the content, anything after the end. Says what was found and what was expected.
    """
    if thinking_mode not in MODES:
        raise ValueError(f"thinking_mode: got {thinking_mode!r}; allowed: {', '.join(MODES)}")
    reasoning = ""
    if thinking_mode == "thinking":
        reasoning, end, text = text.partition(END_THINK)
        if not end:
            raise ValueError(f"answer: got no {END_THINK}; in thinking mode the reasoning must end")
    begin, end = text.find(BLOCK_BEGIN), text.find(EOS)
    calls = []
    if begin >= 0 and (end < 0 or begin < end):
        content = text[:begin]
        calls, end = parse_calls(text, begin + len(BLOCK_BEGIN))
        if text[end:] not in ("", EOS):
            raise ValueError(f"answer: got {text[end:]!r} after tool calls; only {EOS} may follow")
    elif end < 0:
        raise ValueError(f"answer: got no {EOS}; it is not finished")
    else:
        content = text[:end]
        if text[end:] != EOS:
            raise ValueError(f"answer: got {text[end + len(EOS) :]!r} after its end")
    for token in (BOS, EOS, THINK, END_THINK, DSML):
        if token in content or token in reasoning:
            raise ValueError(f"answer: got special token {token} inside its text")
    return {
        "role": "assistant",
        "content": content,
        "reasoning_content": reasoning,
        "tool_calls": calls,
    }
