"""`v4jax info`: which release a checkpoint is, and what is in it.

Next file to read: v4jax/convert/info.py.
"""

import argparse

from v4jax.cli.arguments import CHECKPOINT, CKPT
from v4jax.cli.printing import print_result, print_rows


def declare(sub: argparse.ArgumentParser) -> None:
    """Declares the checkpoint."""
    sub.add_argument("checkpoint", type=CHECKPOINT, help=CKPT)


def run(arguments: argparse.Namespace, _: list[str]) -> dict | None:
    """Reads headers and small files, and prints lines and a table."""
    from v4jax.convert.info import describe

    found = describe(arguments.checkpoint)
    if arguments.json:
        return found.to_dict()
    print_result(found.lines(), as_json=False)
    print_rows(found.rows())
    return None
