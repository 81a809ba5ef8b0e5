"""Declares the flags of every command of v4jax, and nothing else.

Next file to read: v4jax/cli.py.
"""

import argparse
from collections.abc import Callable

from v4jax.storage import file_to_write, local_path

CKPT = "a folder with config.json and safetensors, or a v4jax run"


class BadInput(Exception):
    """Bad input: its message is one line on stderr, and the exit code is 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message}; see {self.prog} --help")


def _checked(read: Callable) -> Callable[[str], str]:
    """The argparse type of a path that `read` accepts (see v4jax/storage.py)."""

    def path(text: str) -> str:
        try:
            return str(read(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return path


PATH = _checked(local_path)
NEW_FILE = _checked(file_to_write)


def parser() -> argparse.ArgumentParser:
    """The parser of command lines; `command` of its result is one of COMMANDS."""
    whole = _Parser(prog="v4jax", description=f"DeepSeek-V4 in JAX: {', '.join(COMMANDS)}.")
    commands = whole.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for name, (text, declare) in COMMANDS.items():
        # v4jax/cli.py answers train's --help, since CONFIG.py adds flags to it.
        sub = commands.add_parser(name, help=text, description=text, add_help=name != "train")
        sub.add_argument("--json", action="store_true", help="print the result as one JSON object")
        declare(sub)
    return whole


def command_help(name: str) -> str:
    """The text that `v4jax NAME --help` prints."""
    actions = [a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return actions[0].choices[name].format_help()


def _on_mesh(sub):
    sub.add_argument(
        "--mesh",
        help="for example data=2,expert=4 (axes: slice, data, fsdp, context, expert, tensor)",
    )
    sub.add_argument(
        "--layout",
        metavar="NAME|FILE.py:NAME",
        help="sharding layout, named or your own (default: full); needs --mesh",
    )
    sub.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="compute dtype (default float32)",
    )


def _quant(sub):
    sub.add_argument(
        "--quant",
        default="none",
        choices=("none", "official"),
        help="official: compute with the fp8 and MXFP4 numbers of the served model (default none)",
    )


def _continues(sub, tokens):
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
    _quant(sub)
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
    _on_mesh(sub)


ABOUT_OVERRIDES = (
    "Trains, or resumes, the run of CONFIG.py. Every field of its TrainConfig is a flag. "
    "Besides: --dry-run prints the plan, stage by stage, and runs nothing; --json prints the "
    "result as one JSON object."
)


def _train(sub):
    sub.add_argument(
        "config", nargs="?", type=PATH, help="CONFIG.py, a Python file with get_config()"
    )
    sub.add_argument(
        "--dry-run", action="store_true", help="print the plan, stage by stage, and run nothing"
    )


def _plot(sub):
    sub.add_argument("run_dir", metavar="RUN", type=PATH, help="the run's folder")


def _generate(sub):
    sub.add_argument("checkpoint", type=PATH, help=CKPT)
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
    sub.add_argument(
        "--speculative", action="store_true", help="draft with MTP: the same tokens in fewer steps"
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
    _continues(sub, 64)


def _chat(sub):
    sub.add_argument(
        "checkpoint", type=PATH, help="with the tokenizer of a DeepSeek-V4 release, or 'byte-chat'"
    )
    sub.add_argument(
        "--thinking",
        default="chat",
        choices=("chat", "thinking"),
        help="thinking: reason before each answer (default chat)",
    )
    sub.add_argument(
        "--effort", help="effort of thinking: high or max; with --release 0731: low, high or max"
    )
    sub.add_argument(
        "--release",
        default="v4",
        choices=("v4", "0731"),
        help="release whose wording asks for the effort (default v4)",
    )
    sub.add_argument("--system", metavar="TEXT", help="system message that opens the conversation")
    sub.add_argument("--seed", type=int, default=0, help="seed of the sampled tokens (default 0)")
    _continues(sub, 512)


def _score(sub):
    sub.add_argument("checkpoint", type=PATH, help=CKPT)
    sub.add_argument("--tokens", required=True, type=PATH, help=".npy file, integers [B, S]")
    sub.add_argument("--out", required=True, type=NEW_FILE, help=".npz file to write")
    _quant(sub)
    _on_mesh(sub)


def _convert(sub):
    sub.add_argument("source", type=PATH, help=CKPT)
    sub.add_argument(
        "target",
        type=PATH,
        help="folder to write: new or empty; an unfinished conversion of SOURCE to it goes on",
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


def _cost(sub):
    sub.add_argument("config", type=PATH, help="CONFIG.py or config.json")
    sub.add_argument(
        "--context", type=int, help="tokens in the sequence (default: max_position_embeddings)"
    )


def _layout(sub):
    sub.add_argument("config", nargs="?", type=PATH, help="CONFIG.py or config.json")
    sub.add_argument("--mesh", help="for example fsdp=8,expert=16 (default: that of CONFIG.py)")
    sub.add_argument(
        "--layout",
        metavar="NAME|FILE.py:NAME",
        help="sharding layout, named or your own (default: that of CONFIG.py, or full)",
    )
    sub.add_argument(
        "--target",
        default="cpu",
        help="cpu; a TPU topology such as v5p:4x4x8 (extra `tpu`); h100:N (extra `gpu`); "
        "estimated only: cloudmatrix384:1024, my-chip.json:16 and others "
        "(v4jax/planner/hardware.json)",
    )
    sub.add_argument(
        "--what",
        choices=("train", "decode"),
        default="train",
        help="step to show: train (the default), or decode, one new token per row",
    )
    sub.add_argument("--seq", type=int, help="tokens per row (default: those of CONFIG.py)")
    sub.add_argument("--batch", type=int, help="rows per step (default: one per device)")
    sub.add_argument(
        "--fp8", action="store_true", help="estimate products at the fp8 rate of the target"
    )
    sub.add_argument(
        "--released",
        action="store_true",
        help="with --what decode: weights and caches in the released formats (fp8, MXFP4), "
        "estimated only",
    )
    sub.add_argument(
        "--paper", action="store_true", help="estimate from the configuration, compile nothing"
    )
    sub.add_argument(
        "--lower-only",
        action="store_true",
        help="stop before compiling: seconds instead of minutes for a full model",
    )
    sub.add_argument(
        "--effort",
        choices=("quick", "full"),
        help="effort of the TPU compiler: quick (the default, at most half the time) or full, as "
        "a run compiles",
    )
    sub.add_argument(
        "--search",
        action="store_true",
        help="rank every layout and mesh of --chips chips by estimate",
    )
    sub.add_argument(
        "--chips", type=int, help="chips to search on (default: as many as the target names)"
    )
    sub.add_argument(
        "--confirm",
        type=int,
        default=0,
        metavar="K",
        help="with --search: compile the best K (default 0)",
    )
    sub.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="show two layouts side by side, each LAYOUT:MESH or FILE.py:NAME:MESH",
    )
    sub.add_argument(
        "--report",
        metavar="OUT.html",
        type=NEW_FILE,
        help="write one page that works offline (after a search: of its winner)",
    )
    sub.add_argument(
        "--stablehlo",
        metavar="OUT",
        type=NEW_FILE,
        help="write the step as a portable module (extra `export`); nothing else is done",
    )
    sub.add_argument(
        "--measure",
        metavar="OUT.json",
        type=NEW_FILE,
        help="measure this machine and write it as a hardware profile; no CONFIG",
    )


def _launch(sub):
    sub.add_argument("--processes", type=int, required=True, help="number of local processes")
    sub.add_argument(
        "--devices", type=int, required=True, help="simulated CPU devices of each process"
    )
    sub.add_argument(
        "--output",
        choices=("all", "first"),
        default="all",
        help="all: every process's lines, after [i]; first: those of process 0, unchanged",
    )


COMMANDS = {
    "train": ("Train, or resume, the run that CONFIG.py describes.", _train),
    "plot": ("Write RUN/summary.html, one page about a run, also while it runs.", _plot),
    "generate": ("Continue a prompt.", _generate),
    "chat": ("Chat: each line of input is a turn; Ctrl-D ends.", _chat),
    "score": ("Write the logits and the loss of every token of a .npy file.", _score),
    "convert": ("Convert between safetensors and the v4jax store.", _convert),
    "cost": (
        "Show parameters, FLOPs per token and cache bytes, from the configuration alone.",
        _cost,
    ),
    "layout": (
        "Show the memory, traffic and time of a layout: estimated, or compiled for devices that "
        "need not exist.",
        _layout,
    ),
    "launch": (
        "Run -- COMMAND as one JAX job of local processes on simulated CPU devices.",
        _launch,
    ),
}
"""Name -> (what the command does, in a sentence; the function that declares its flags)."""
