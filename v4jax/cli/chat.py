"""`v4jax chat`: a conversation on the terminal.

Next file to read: v4jax/generate/chat.py.
"""

import argparse

from v4jax.cli.arguments import CHECKPOINT, continues, one_adapter
from v4jax.cli.start import start


def declare(sub: argparse.ArgumentParser) -> None:
    """Declares the checkpoint, the conversation, and how tokens are chosen."""
    sub.add_argument(
        "checkpoint",
        type=CHECKPOINT,
        help="a folder, a run or org/name[@revision] of the Hub, with the tokenizer of a "
        "DeepSeek-V4 release, or 'byte-chat'",
    )
    sub.add_argument(
        "--thinking",
        default="chat",
        choices=("chat", "thinking"),
        help="thinking: reason before each answer (default chat)",
    )
    sub.add_argument(
        "--effort", help="effort of thinking: high or max; of release 0731: low, high or max"
    )
    sub.add_argument(
        "--release",
        choices=("v4", "0731"),
        help="release whose wording asks for the effort (default: that of the checkpoint, by its "
        "encoding/encoding_dsv4.py, which is read and not run, else by config.json)",
    )
    sub.add_argument("--system", metavar="TEXT", help="system message that opens the conversation")
    sub.add_argument("--seed", type=int, default=0, help="seed of the sampled tokens (default 0)")
    continues(sub, 512)


def run(arguments: argparse.Namespace, _: list[str]) -> dict | None:
    """Answers each line of input."""
    arguments.adapter = one_adapter(arguments.adapter, "chat")
    start(arguments.mesh)
    from v4jax.generate import chat

    return chat.run(arguments)
