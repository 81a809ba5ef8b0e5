"""`v4jax convert`: from one format of a checkpoint to another.

Next file to read: v4jax/convert/conversion.py.
"""

import argparse

from v4jax.cli.arguments import CHECKPOINT, CKPT, PLACE, BadInput


def declare(sub: argparse.ArgumentParser) -> None:
    """Declares where from, where to, and the format."""
    sub.add_argument("source", type=CHECKPOINT, help=CKPT)
    sub.add_argument(
        "target",
        type=PLACE,
        help="folder to write, here or in a bucket: new or empty; an unfinished conversion of "
        "SOURCE to it goes on",
    )
    sub.add_argument(
        "--format",
        choices=("orbax", "safetensors"),
        default="safetensors",
        help="safetensors with official names (the default), or orbax, the v4jax store",
    )
    sub.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "fp8", "official"),
        help="precision on disk (default float32); official: fp8, and MXFP4 for the experts",
    )
    sub.add_argument(
        "--drop",
        action="append",
        default=[],
        choices=("drafter", "vision"),
        help="leave out what drafts (DSpark or MTP), or the vision tower; config.json follows. "
        "It may be given twice",
    )
    sub.add_argument(
        "--adapter",
        type=CHECKPOINT,
        metavar="DIR",
        help="merge this low-rank adapter, as v4jax train or PEFT writes it, into the matrices",
    )
    sub.add_argument(
        "--verify",
        action="store_true",
        help="compare TARGET with SOURCE tensor by tensor; TARGET is made first if it is missing",
    )
    sub.add_argument(
        "--max-file-bytes",
        type=int,
        default=5 * 10**9,
        help="largest safetensors file in bytes (default 5 * 10**9)",
    )
    sub.add_argument(
        "--workers",
        type=int,
        default=2,
        help="tensors or files converted at a time (default 2); each needs memory for one tensor",
    )


def run(arguments: argparse.Namespace, _: list[str]) -> dict:
    """Converts, or compares, or both."""
    from sharding.mesh import keep_freed_memory
    from v4jax.convert.compare import compare
    from v4jax.convert.conversion import convert
    from v4jax.storage import place

    if arguments.verify and arguments.adapter is not None:
        raise BadInput("--verify compares TARGET with SOURCE; it does not go with --adapter")
    keep_freed_memory(one_heap=True)
    result = {}
    if not arguments.verify or not place(arguments.target).exists():
        result = convert(
            arguments.source,
            arguments.target,
            arguments.format,
            arguments.dtype,
            arguments.max_file_bytes,
            arguments.workers,
            arguments.drop,
            arguments.adapter,
        )
    if not arguments.verify:
        return result
    return result | compare(arguments.source, arguments.target, arguments.drop)
