"""`v4jax layout`: what a layout costs, or which one is best.

Next file to read: v4jax/cli/layout_options.py.
"""

import argparse
import json
import pathlib

from v4jax.cli.arguments import NEW_FILE, PATH, BadInput
from v4jax.cli.config_file import read_config_file
from v4jax.cli.layout_options import check_options
from v4jax.cli.printing import print_rows
from v4jax.cli.start import start


def declare(sub: argparse.ArgumentParser) -> None:
    """Declares the configuration, a layout, a target, and what to do with them."""
    _declare_what(sub)
    _declare_how(sub)
    _declare_instead(sub)


def _declare_what(sub: argparse.ArgumentParser) -> None:
    """What is laid out, and on what."""
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
        help="cpu; a TPU topology such as v5p:4x4x8 (extra `tpu`); h100:N or h200:N (extra "
        "`gpu`); estimated only: cloudmatrix384:1024, my-chip.json:16 and others "
        "(v4jax/planner/hardware.json)",
    )
    sub.add_argument(
        "--what",
        choices=("train", "decode", "lora"),
        default="train",
        help="step to show: train (the default); decode, one new token per row; or lora, training "
        "of CONFIG.py's adapters; without any, of rank 16 on all matrices of the packed released "
        "weights, with one micro-batch and no stages, samples or gather=step",
    )
    sub.add_argument("--seq", type=int, help="tokens per row (default: those of CONFIG.py)")
    sub.add_argument(
        "--batch",
        type=int,
        help="rows per step (default: those of CONFIG.py for training, otherwise one per device)",
    )
    sub.add_argument(
        "--gradient-accumulation",
        type=int,
        metavar="N",
        help="micro-batches per step (default: CONFIG.py's with its own batch, else 1); "
        "--search takes more where memory asks for it",
    )
    sub.add_argument(
        "--remat",
        metavar="NAME",
        help="what the backward pass recomputes: none, layer, attention, experts, dots or offload "
        "(default: that of CONFIG.py; --search tries all)",
    )


def _declare_how(sub: argparse.ArgumentParser) -> None:
    """How it is estimated or compiled."""
    sub.add_argument(
        "--fp8", action="store_true", help="estimate products at the fp8 rate of the target"
    )
    sub.add_argument(
        "--released",
        action="store_true",
        help="with --what decode: weights and caches in the released formats (fp8, MXFP4), "
        "as generate --dtype packed --cache official holds them",
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
        "--estimate",
        choices=("model", "compiler"),
        default="model",
        help="whose estimate of a step's time: the fast model's (the default), or XLA's too, by "
        "part, compiled with full effort for a TPU topology, h100:N or h200:N",
    )


def _declare_instead(sub: argparse.ArgumentParser) -> None:
    """What to do instead of showing one layout, and files to write."""
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


def run(arguments: argparse.Namespace, _: list[str]) -> dict | None:
    """Examines, compares or searches layouts, and prints a table."""
    check_options(arguments, _defaults())
    if arguments.measure:
        return _measure(arguments.measure)
    if arguments.config is None:
        raise BadInput("layout needs a CONFIG.py or config.json; see v4jax layout --help")
    is_file = pathlib.Path(arguments.config).suffix == ".py"
    config = read_config_file(arguments.config) if is_file else arguments.config
    from v4jax.planner.nearest import checked
    from v4jax.planner.request import Request, config_of, devices_of

    names = ("target", "what", "paper", "lower_only", "effort", "fp8", "released", "estimate")
    request = Request(**{name: getattr(arguments, name) for name in names})
    request = request._replace(any_remat=arguments.search and arguments.remat is None)
    if request.what == "lora":  # training, of the configuration that config_of makes
        request = request._replace(what="train")
    cfg = config_of(config, arguments)
    if arguments.target == "cpu" and arguments.search and arguments.confirm:
        start(f"data={devices_of('cpu', arguments.chips)}")
    elif arguments.stablehlo or (
        arguments.target == "cpu" and not (arguments.search or arguments.compare)
    ):
        start(cfg.mesh)
    if arguments.stablehlo:
        from v4jax.planner.portable import write_stablehlo

        return write_stablehlo(arguments.stablehlo, cfg, checked(cfg, request).hardware)
    return _show(arguments, cfg, request)


def _defaults() -> argparse.Namespace:
    """What an empty command line gives."""
    empty = argparse.ArgumentParser()
    declare(empty)
    return empty.parse_args([])


def _show(arguments: argparse.Namespace, cfg, request) -> dict | None:
    """Prints what the planner finds, and writes its page."""
    from v4jax.planner.command import compare, examine, look_for

    if arguments.compare:
        result = compare(cfg, request, arguments.compare)
    elif arguments.search:
        result = look_for(cfg, request, arguments.chips, arguments.confirm)
    else:
        result = examine(cfg, request)
    if arguments.report:
        from v4jax.planner.page import report

        report(arguments.report, cfg, request, result)
    if arguments.json:
        return result.to_dict()
    print_rows(result.rows())
    for line in result.lines():
        print(line)
    return None


def _measure(path: str) -> dict:
    """Measures this machine and writes its CPU profile to `path`."""
    start("data=8")
    from v4jax.planner.measure import measure

    found = measure()
    pathlib.Path(path).write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    return found
