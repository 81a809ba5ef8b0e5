"""`v4jax generate`: continues a prompt.

Next file to read: v4jax/generate/command.py.
"""

import argparse

from v4jax.cli.arguments import CHECKPOINT, CKPT, PATH, continues, named_adapters, one_adapter
from v4jax.cli.start import start


def declare(sub: argparse.ArgumentParser) -> None:
    """Declares the checkpoint, the prompt, and how tokens are chosen."""
    sub.add_argument("checkpoint", type=CHECKPOINT, help=CKPT)
    _declare_samples(sub)
    _declare_ends(sub)
    _declare_shortcuts(sub)
    continues(sub, 64, several=True)


def _declare_samples(sub: argparse.ArgumentParser) -> None:
    """What is continued, and how often."""
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompt", help="text to continue (needs tokenizer.json in the checkpoint)"
    )
    source.add_argument("--tokens", help="token ids to continue, for example 0,17,4")
    sub.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the first sample; the others count up from it (default 0)",
    )
    sub.add_argument(
        "--samples", type=int, default=1, help="number of continuations of the prompt (default 1)"
    )


def _declare_ends(sub: argparse.ArgumentParser) -> None:
    """What a continuation ends before."""
    sub.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text, which is left out (may be repeated)",
    )
    sub.add_argument(
        "--stop-tokens",
        help="end before one of these ids, for example 1,7, instead of the checkpoint's end tokens",
    )


def _declare_shortcuts(sub: argparse.ArgumentParser) -> None:
    """What makes it faster."""
    sub.add_argument(
        "--speculative",
        action="store_true",
        help="draft with what the checkpoint has, DSpark or MTP: the same tokens in fewer steps",
    )
    sub.add_argument(
        "--prefix-cache",
        metavar="DIR",
        type=PATH,
        help="folder where the caches of prompts' beginnings are kept and looked up",
    )
    sub.add_argument(
        "--prefix-cache-bytes",
        type=int,
        default=10 * 10**9,
        help="bytes that DIR may take (default 10**10); the least recently used files go first",
    )


def run(arguments: argparse.Namespace, _: list[str]) -> dict | None:
    """Continues the prompt."""
    given = arguments.adapter
    if given is not None and (len(given) > 1 or given[0].name):
        arguments.adapter = named_adapters(given)
    else:
        arguments.adapter = one_adapter(given, "generate")
    start(arguments.mesh)
    from v4jax.generate import command

    return command.run(arguments)
