"""What flags of several commands have in common, and how a bad command line ends.

Next file to read: v4jax/cli/train.py.
"""

import argparse
import os
import re
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from sharding.axes import MESH_AXES
from v4jax.storage import checkpoint_name, file_to_write, local_path, place

CKPT = (
    "a folder with config.json and safetensors or a v4jax run, here or in a bucket (gs://, s3://), "
    "or org/name[@revision] of the Hub"
)


class BadInput(Exception):
    """Bad input: its message is one line on stderr, and the exit code is 2."""


class Parser(argparse.ArgumentParser):
    """Raises BadInput instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see {self.prog} --help")


def _checked(read: Callable) -> Callable[[str], str]:
    """The argparse type of a path that `read` accepts (see v4jax/storage/places.py)."""

    def path(text: str) -> str:
        try:
            return str(read(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return path


PATH = _checked(local_path)
CHECKPOINT = _checked(checkpoint_name)
PLACE = _checked(place)
NEW_FILE = _checked(file_to_write)


class Adapter(NamedTuple):
    """What a value of --adapter names.

    Attributes:
      name: "" for a folder without a name.
      folder: "" for the base itself.
    """

    name: str
    folder: str


def _is_named(text: str) -> bool:
    """Whether it is NAME=DIR, or NAME=. A path that exists is a path, whatever its name."""
    return re.match(r"[\w.-]+=", text) is not None and not os.path.lexists(text)


def _adapter(text: str) -> Adapter:
    """NAME=DIR, NAME= for the base, or DIR."""
    if not _is_named(text):
        return Adapter("", CHECKPOINT(text))
    name, _, folder = text.partition("=")
    return Adapter(name, CHECKPOINT(folder) if folder else "")


ADAPTER: Callable[[str], Adapter] = _adapter


def with_flags(argv: list[str]) -> list[str]:
    """The command line with --adapter before each NAME=DIR that follows another.

    With nargs="+" argparse would take the checkpoint for one more folder where it comes last.
    Example: --adapter a=A b=B CKPT becomes --adapter a=A --adapter b=B CKPT.
    """
    found: list[str] = []
    for word in argv:
        joined = "".join(found[-1:]).startswith("--adapter=")
        if (joined or found[-2:-1] == ["--adapter"]) and _is_named(word):
            found.append("--adapter")
        found.append(word)
    return found


def one_adapter(given: list[Adapter] | None, command: str) -> str | None:
    """The folder of a command that takes one adapter; None without the flag.

    Raises:
      BadInput: several, or the base.
    """
    if given is None:
        return None
    if len(given) > 1 or not given[0].folder:
        got = " ".join(f"{one.name}={one.folder}".removeprefix("=") for one in given)
        raise BadInput(
            f"--adapter: got {got}; {command} takes one folder, and only generate takes several"
        )
    return given[0].folder


def named_adapters(given: list[Adapter]) -> dict[str, str | None]:
    """Name -> folder, or None for the base, of several adapters.

    Raises:
      BadInput: one without a name, a name twice, or no folder at all.
    """
    names = [one.name for one in given]
    for one in given:
        if not one.name:
            raise BadInput(
                f"--adapter: got {one.folder} among several; name each, as NAME=DIR (a name has "
                "letters, digits, _, . and -)"
            )
        if names.count(one.name) > 1:
            raise BadInput(f"--adapter: got the name {one.name} twice; each must have its own")
    if not any(one.folder for one in given):
        raise BadInput(f"--adapter: got {names[0]}= alone, which is the base; add NAME=DIR")
    return {one.name: one.folder or None for one in given}


def on_mesh(sub: argparse.ArgumentParser) -> None:
    """Flags that place a model on devices."""
    sub.add_argument("--mesh", help=f"for example data=2,expert=4 (axes: {', '.join(MESH_AXES)})")
    sub.add_argument(
        "--layout",
        metavar="NAME|FILE.py:NAME",
        help="sharding layout, named or your own (default: full); needs --mesh",
    )
    sub.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "packed"),
        help="compute dtype (default float32); packed: bfloat16, with fp8 and MXFP4 weights kept "
        "as the files have them and read layer by layer",
    )


def numbers(sub: argparse.ArgumentParser, several: bool = False) -> None:
    """The flags that choose the served model's numbers, and what computes them.

    Args:
      several: whether the command takes several adapters.
    """
    more = "; or several, NAME=DIR NAME=DIR ..., each of which continues the prompt, in one batch"
    more = f"{more}; NAME= is the base without an adapter" if several else ""
    sub.add_argument(
        "--adapter",
        type=ADAPTER,
        action="append",
        metavar="DIR",
        help="folder of a low-rank adapter, as v4jax train or PEFT writes it (default: none)"
        + more,
    )
    sub.add_argument(
        "--quant",
        default="none",
        choices=("none", "official"),
        help="official: compute with the fp8 and MXFP4 numbers of the served model (default none)",
    )
    sub.add_argument(
        "--kernels",
        default="",
        metavar="NAMES",
        help="implementations of ops: reference, or pairs such as top_k=bisection,matmul=reference "
        "(default: the best of the platform; another platform's kernel is interpreted, slowly)",
    )


def continues(sub: argparse.ArgumentParser, tokens: int, several: bool = False) -> None:
    """Flags of commands that add tokens, by default `tokens` of them; `several` as in `numbers`."""
    sub.set_defaults(default_new_tokens=tokens)
    default = "default: the checkpoint's generation_config.json, else "
    sub.add_argument(
        "--max-new-tokens", type=int, help=f"tokens to add at most, 1 or more ({default}{tokens})"
    )
    sub.add_argument(
        "--temperature", type=float, help=f"0 or more; 0 takes the likeliest token ({default}0)"
    )
    sub.add_argument(
        "--top-p",
        type=float,
        help="sample from the likeliest tokens whose probabilities add up to this, above 0, at "
        f"most 1 ({default}1: all)",
    )
    sub.add_argument(
        "--top-k", type=int, help=f"sample from this number of likeliest tokens ({default}0: all)"
    )
    sub.add_argument(
        "--min-p",
        type=float,
        help="sample from tokens at least this share as probable as the likeliest, 0 to 1 "
        f"({default}0: all)",
    )
    numbers(sub, several)
    sub.add_argument(
        "--cache",
        default="dtype",
        choices=("dtype", "official"),
        help="format of the cache: dtype, that of --dtype (the default); official, the fp8 and "
        "MXFP4 of the served model, with --quant official",
    )
    sub.add_argument(
        "--cache-tokens",
        type=int,
        help="tokens that fit in the cache (default: what --max-new-tokens needs; 4096 for chat, "
        "or if the limit is the file's)",
    )
    on_mesh(sub)
