"""The commands: what each does, its flags, and the function that runs it.

Next file to read: v4jax/cli/arguments.py.
"""

import argparse
from collections.abc import Callable

from v4jax.cli import chat, convert, cost, generate, info, launch, layout, plot, score, train
from v4jax.cli.arguments import Parser

COMMANDS: dict[str, tuple[str, Callable, Callable]] = {
    "train": ("Train, or resume, the run that CONFIG.py describes.", train.declare, train.run),
    "plot": (
        "Write RUN/summary.html, one page about a run, also while it runs.",
        plot.declare,
        plot.run,
    ),
    "generate": ("Continue a prompt.", generate.declare, generate.run),
    "chat": ("Chat: each line of input is a turn; Ctrl-D ends.", chat.declare, chat.run),
    "score": (
        "Write the logits and the loss of every token of a .npy file.",
        score.declare,
        score.run,
    ),
    "convert": ("Convert between safetensors and the v4jax store.", convert.declare, convert.run),
    "info": (
        "Show which release a checkpoint is, its parts and their precision, and what is carried.",
        info.declare,
        info.run,
    ),
    "cost": (
        "Show parameters, FLOPs per token and cache bytes, from the configuration alone.",
        cost.declare,
        cost.run,
    ),
    "layout": (
        "Show the memory, traffic and time of a layout: estimated, or compiled for devices that "
        "need not exist.",
        layout.declare,
        layout.run,
    ),
    "launch": (
        "Run -- COMMAND as one JAX job of local processes on simulated CPU devices.",
        launch.declare,
        launch.run,
    ),
}
"""Name -> (what the command does, in a sentence; what declares its flags; what runs it).

What runs it gets the flags, and the arguments that the parser did not know: the overrides of train,
the COMMAND of launch. It returns a result to print, or None; that of launch
returns an exit code.
"""


def parser() -> argparse.ArgumentParser:
    """The parser of command lines; `command` of its result is one of COMMANDS."""
    whole = Parser(prog="v4jax", description=f"DeepSeek-V4 in JAX: {', '.join(COMMANDS)}.")
    commands = whole.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, (text, declare, _) in COMMANDS.items():
        # v4jax/cli/main.py answers train's --help, since CONFIG.py adds flags to it.
        sub = commands.add_parser(name, help=text, description=text, add_help=name != "train")
        sub.add_argument("--json", action="store_true", help="print the result as one JSON object")
        declare(sub)
    return whole


def command_help(name: str) -> str:
    """The text that `v4jax NAME --help` prints."""
    actions = [a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return actions[0].choices[name].format_help()
