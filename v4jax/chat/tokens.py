"""Special tokens of DeepSeek-V4's chat format. Each is one token of the released tokenizer.

Next file to read: v4jax/chat/dsml.py.
"""

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT, LATEST_REMINDER = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"
THINK, END_THINK = "<think>", "</think>"
DSML = "｜DSML｜"
"""Marks the tags of tool calls, so that other text that looks alike is never taken for them."""

TASKS = {
    name: f"<｜{name}｜>"
    for name in ("action", "query", "authority", "domain", "title", "read_url")
}
"""Quick instructions. A message with such a "task" gets a short answer, without thinking.

"action" comes after the assistant token, "title" after the assistant's answer, the others after the
user's text.
"""

FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
"""Fill-in-middle, prefix first: begin, prefix, hole, suffix, end, middle."""

CHAT_TOKENS = (USER, ASSISTANT, LATEST_REMINDER, THINK, END_THINK, DSML, *TASKS.values())
FIM_TOKENS = (FIM_BEGIN, FIM_HOLE, FIM_END)
