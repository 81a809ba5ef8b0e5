"""The fields of a run's configuration as flags of `v4jax train`.

Next file to read: README.md, which shows every command.
"""

import contextlib
import copy
import dataclasses
import difflib
import io
import os
import re
import types
import typing

from v4jax.adapters.config import Lora
from v4jax.cli.arguments import BadInput

ABOUT_OVERRIDES = (
    "Trains, or resumes, the run of CONFIG.py. Every field of its TrainConfig is a flag. "
    "Besides: --dry-run prints the plan, stage by stage, and runs nothing; --json prints the "
    "result as one JSON object."
)


def override(cfg, rest: list[str], program: str):
    """The config with typed command-line overrides; a bad one is one line on stderr."""
    import tyro

    if cfg.lora is None and any(word.startswith("--lora.") for word in rest):
        cfg = copy.copy(cfg)  # tyro reads flags of a nested config only where there is one
        object.__setattr__(cfg, "lora", Lora())
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _no_wrapping(rest):
            return tyro.cli(
                type(cfg), default=cfg, args=rest, prog=program, description=ABOUT_OVERRIDES
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise BadInput(_complaint(said.getvalue(), type(cfg), program)) from None


def _complaint(said: str, config: type, program: str) -> str:
    """One line of tyro's words about a bad override; for an unknown flag, the nearest one."""
    words = re.sub(r"[─-╿]+|-{3,}", " ", re.sub(r"\x1b\[[0-9;]*m", "", said))
    if unknown := re.search(r"Unrecognized options:\s+--([\w.-]+)", words):
        flags = [name.replace("_", "-") for name in _fields(config)]
        near = difflib.get_close_matches(unknown[1].replace("_", "-"), flags, n=1, cutoff=0.5)
        hint = f" (did you mean --{near[0]}?)" if near else ""
        return f"no option --{unknown[1]}{hint}; see {program} --help"
    words = re.sub(r"^\s*Value error\s+Error parsing (\w+:)?", "", words)
    words = re.split("Argument helptext:|For full helptext", words)[0]
    number = re.search(r"(--[\w.-]+): invalid literal for (\w+)\(\).*?: ('.*?')", words)
    if number:
        return f"{number[1]}: got {number[3]}; must be an integer"
    return words or "bad override"


def _fields(config: type, head: str = "") -> list[str]:
    """Names of the fields of a config and of the configs in it, such as data.chat.too_long."""
    found = []
    for field in dataclasses.fields(config):
        inner = _config_of(field.type)
        if inner is not None:
            found += _fields(inner, f"{head}{field.name}.")
        else:
            found.append(f"{head}{field.name}")
    return found


def _config_of(kind) -> type | None:
    """The config class of a field of this type, which may be optional; None for a plain value."""
    if isinstance(kind, type):
        return kind if dataclasses.is_dataclass(kind) else None
    if typing.get_origin(kind) is typing.Annotated:
        return _config_of(typing.get_args(kind)[0])
    if typing.get_origin(kind) not in (typing.Union, types.UnionType):
        return None
    given = [one for one in typing.get_args(kind) if one is not types.NoneType]
    return _config_of(given[0]) if len(given) == 1 else None


@contextlib.contextmanager
def _no_wrapping(rest: list[str]):
    """Keeps an error on one long line, so that no path is broken in two; help still wraps."""
    before = os.environ.get("COLUMNS")
    if not {"-h", "--help"} & set(rest):
        os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before
