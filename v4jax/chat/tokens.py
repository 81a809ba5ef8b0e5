"""Special tokens of DeepSeek-V4's chat format, as text; each is one token of the released tokenizer.

Next file to read: v4jax/chat/dsml.py.
"""

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT, LATEST_REMINDER = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"
THINK, END_THINK = "<think>", "</think>"
DSML = "｜DSML｜"
"""Marks the tags of tool calls, so that text of the same look is never taken for them."""

TASKS = {
    name: f"<｜{name}｜>"
    for name in ("action", "query", "authority", "domain", "title", "read_url")
}
"""Quick instructions: a message with such a "task" is followed by a short answer, without thinking. "action" is asked
of the assistant; "title" follows its answer; the others follow the user's text."""

FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
"""Fill-in-middle, prefix first: begin, prefix, hole, suffix, end, middle."""

CHAT_TOKENS = (USER, ASSISTANT, LATEST_REMINDER, THINK, END_THINK, DSML, *TASKS.values())
FIM_TOKENS = (FIM_BEGIN, FIM_HOLE, FIM_END)
