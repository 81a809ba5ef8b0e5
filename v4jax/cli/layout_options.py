"""Which options of `v4jax layout` go together; one without effect is refused by name.

Next file to read: v4jax/planner/command.py.
"""

import argparse
from collections.abc import Iterator

from v4jax.cli.arguments import BadInput

_ANY = ("config", "target", "seq", "batch", "gradient_accumulation", "remat")
_ESTIMATED = (*_ANY, "what", "fp8", "released", "paper")

_JOBS = {
    "measure": (),
    "stablehlo": (*_ANY, "mesh", "layout"),
    "compare": _ESTIMATED,
    "search": (*_ESTIMATED, "layout", "chips", "confirm", "effort", "estimate", "report"),
}
"""Option that asks for something else than one layout -> the options that it reads."""

_NOT_WITH = {
    "lower_only": ("paper",),
    "effort": ("paper", "lower_only"),
    "estimate": ("paper", "lower_only"),
    "confirm": ("paper",),
}
"""Option -> options with which nothing is compiled, or not as far."""

_ONLY_WITH = {"chips": "search", "confirm": "search"}


def check_options(arguments: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """Refuses options that would have no effect.

    Args:
      arguments: of the command line.
      defaults: of an empty one; an option that has its default is not given.

    Raises:
      BadInput: names two options that do not go together, or one that lacks another.
    """
    given = [name for name, value in vars(defaults).items() if getattr(arguments, name) != value]
    for name, other in _clashes(given, arguments):
        raise BadInput(f"{_flag(name)} has no effect with {_flag(other)}; leave one of them out")
    for name, other in _lacking(given, arguments):
        raise BadInput(f"{_flag(name)} has no effect without {other}")
    if arguments.confirm < 0:
        raise BadInput(f"--confirm: got {arguments.confirm}; must be 0 or more")


def _clashes(given: list[str], arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(an option without effect, the option that leaves it none)."""
    job = next((job for job in _JOBS if job in given), None)
    if job is not None:
        yield from ((name, job) for name in given if name != job and name not in _JOBS[job])
    for name, others in _NOT_WITH.items():
        yield from ((name, other) for other in others if name in given and other in given)
    if arguments.what == "decode":
        yield from ((name, "what") for name in ("gradient_accumulation", "remat") if name in given)


def _lacking(given: list[str], arguments: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(an option without effect, what would give it one)."""
    for name, other in _ONLY_WITH.items():
        if name in given and other not in given:
            yield name, _flag(other)
    if "released" in given and arguments.what != "decode":
        yield "released", "--what decode"
    if "search" in given and "confirm" not in given:
        yield from (
            (name, "--confirm K beside --search")
            for name in ("effort", "estimate")
            if name in given
        )
    if "search" in given and isinstance(arguments.layout, str):
        yield "layout", "FILE.py:NAME: --search tries every named layout"


def _flag(name: str) -> str:
    """The option as it is written; of one with a default, the value that is none."""
    values = {"config": "CONFIG", "what": "--what decode", "estimate": "--estimate compiler"}
    return values.get(name, f"--{name.replace('_', '-')}")
