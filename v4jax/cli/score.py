"""`v4jax score`: logits and loss of a file of tokens.

Next file to read: v4jax/score.py.
"""

import argparse

from v4jax.cli.arguments import CHECKPOINT, CKPT, NEW_FILE, PATH, numbers, on_mesh, one_adapter
from v4jax.cli.start import start


def declare(sub: argparse.ArgumentParser) -> None:
    """Declares the checkpoint, the tokens, and the file to write."""
    sub.add_argument("checkpoint", type=CHECKPOINT, help=CKPT)
    sub.add_argument("--tokens", required=True, type=PATH, help=".npy file, integers [B, S]")
    sub.add_argument("--out", required=True, type=NEW_FILE, help=".npz file to write")
    numbers(sub)
    on_mesh(sub)


def run(arguments: argparse.Namespace, _: list[str]) -> dict | None:
    """Writes the .npz file."""
    adapter = one_adapter(arguments.adapter, "score")
    start(arguments.mesh)
    from sharding.processes import is_first
    from v4jax.score import score

    result = score(
        arguments.checkpoint,
        arguments.tokens,
        arguments.out,
        arguments.mesh,
        arguments.layout,
        arguments.dtype,
        arguments.quant,
        arguments.kernels,
        adapter,
    )
    return result if is_first() else None
