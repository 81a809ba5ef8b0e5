"""The command line: parses, calls, prints.

Exit code 0: done; 1: failed while running; 2: bad input, one line on stderr.

Next file to read: README.md, which shows every command.
"""

import contextlib
import dataclasses
import difflib
import io
import json
import math
import os
import pathlib
import re
import sys
import traceback

from v4jax.arguments import ABOUT_OVERRIDES, BadInput, command_help, parser


def entry() -> None:
    """Runs the `v4jax` command and ends the process with its exit code."""
    code = main()
    if code:  # after Ctrl-C the interpreter would wait for a compilation to end, for minutes
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(argv)
        sys.stdout.flush()
    except (BadInput, ValueError) as error:
        if os.environ.get("V4JAX_TRACEBACK"):
            traceback.print_exc()
        print(f"v4jax: {_one_line(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("v4jax: interrupted", file=sys.stderr)
        code = 1
    except BrokenPipeError:  # the reader has seen enough, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (RuntimeError, OSError) as error:
        print(f"v4jax: failed: {_one_line(error)}", file=sys.stderr)
        code = 1
    except Exception:
        if _one_of_several():
            traceback.print_exc()
            sys.modules["sharding.processes"].leave(1)
        raise
    if code and _one_of_several():
        sys.modules["sharding.processes"].leave(code)
    return code


def _one_of_several() -> bool:
    return "sharding.processes" in sys.modules and sys.modules["sharding.processes"].is_joined()


def _run(argv: list[str]) -> int:
    command = []
    if argv[:1] == ["launch"] and "--" in argv:  # what follows -- is another program's
        command = argv[argv.index("--") + 1 :]
        argv = argv[: argv.index("--")]
    arguments, rest = parser().parse_known_args(argv)
    if rest and arguments.command != "train":
        raise BadInput(f"unknown argument {rest[0]!r}; see v4jax {arguments.command} --help")
    if arguments.command == "launch":
        return _launch(arguments, command)
    if getattr(arguments, "layout", None):
        from v4jax.python_files import read_layout

        arguments.layout = read_layout(arguments.layout)
    result = RUNS[arguments.command](arguments, rest)
    if result is not None:
        _print(result, arguments.json)
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ---- commands: heavy imports are inside, so that --help and bad flags answer at once -------------


def _train(arguments, rest):
    if arguments.config is None:
        if {"-h", "--help"} & set(rest):
            print(command_help("train"))
            return None
        raise BadInput(
            "train needs a CONFIG.py; see v4jax train CONFIG.py --help for its overrides"
        )
    cfg = _override(_read_config_file(arguments.config), rest, f"v4jax train {arguments.config}")
    if arguments.dry_run:
        return _plan(cfg, arguments.json)
    _start(cfg.mesh, preemptible=True)
    from v4jax.train.loop import train

    summary = train(cfg)
    if cfg.sample_tokens and "stopped_at" not in summary:
        summary |= _sample(cfg)
    if "run_dir" not in summary:  # this is not the first of several processes
        return None
    return summary | {"peak_memory": f"{_peak_memory() / 1e9:.1f} GB"}


def _plan(cfg, as_json: bool) -> dict | None:
    from v4jax.planner.plan import HEAD, as_dict, plan

    if as_json:
        return as_dict(cfg)
    _print_rows([HEAD, *(stage.row() for stage in plan(cfg))])
    return None


def _peak_memory() -> int:
    """The most bytes of memory that this process has had resident."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def _sample(cfg) -> dict:
    """Lets the finished run continue cfg.sample_prompt; writes the text to sample.txt too."""
    import jax

    from sharding.processes import is_first
    from v4jax.api import load, place_on
    from v4jax.generate.decode import generate
    from v4jax.generate.sampling import Sampling
    from v4jax.generate.steps import DecodeConfig
    from v4jax.generate.text import TextStop
    from v4jax.storage import local_path
    from v4jax.tokenizer import load_tokenizer, prompt_ids

    tokenizer = load_tokenizer(cfg.run_dir)
    model, params = load(cfg.run_dir, mesh=cfg.mesh, layout=cfg.layout)
    mesh, rules = place_on(cfg.mesh, cfg.layout)
    prompt = prompt_ids(tokenizer, cfg.sample_prompt)
    with jax.set_mesh(mesh):
        (completion,) = generate(
            model,
            params,
            [prompt],
            cfg.sample_tokens,
            seeds=[cfg.seed],
            decoding=DecodeConfig(rules=rules, dtype=cfg.dtype, sampling=Sampling(temperature=0.7)),
        )
    stop = TextStop(model.eos_token_ids, tokenizer=tokenizer)
    text = cfg.sample_prompt + stop.text(completion.tokens)
    if not is_first():
        return {}
    (local_path(cfg.run_dir, "run_dir") / "sample.txt").write_text(text)
    return {"sample": text}


def _plot(arguments, _):
    from v4jax.train.picture import write_summary

    return {"picture": str(write_summary(arguments.run_dir))}


def _generate(arguments, _):
    _start(arguments.mesh)
    from v4jax.generate.command import run

    return run(arguments)


def _chat(arguments, _):
    _start(arguments.mesh)
    from v4jax.generate.chat import run

    return run(arguments)


def _score(arguments, _):
    _start(arguments.mesh)
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
    )
    return result if is_first() else None


def _convert(arguments, _):
    from sharding.mesh import keep_freed_memory
    from v4jax.convert import compare, convert

    keep_freed_memory(one_heap=True)
    result = {}
    if not arguments.verify or not pathlib.Path(arguments.target).exists():
        result = convert(
            arguments.source,
            arguments.target,
            arguments.format,
            arguments.dtype,
            arguments.max_file_bytes,
            arguments.workers,
        )
    return result | compare(arguments.source, arguments.target) if arguments.verify else result


def _cost(arguments, _):
    from v4jax.config import ModelConfig
    from v4jax.cost import cost

    path = pathlib.Path(arguments.config)
    model = _read_config_file(path).model if path.suffix == ".py" else ModelConfig.from_json(path)
    result = cost(model, arguments.context)
    if arguments.json:
        return result.to_dict()
    _print_rows(result.rows())
    return None


def _layout(arguments, _):
    if arguments.measure:
        return _measure(arguments.measure)
    if arguments.config is None:
        raise BadInput("layout needs a CONFIG.py or config.json; see v4jax layout --help")
    is_file = pathlib.Path(arguments.config).suffix == ".py"
    config = _read_config_file(arguments.config) if is_file else arguments.config
    from v4jax.planner import command

    names = ("target", "what", "paper", "lower_only", "effort", "fp8", "released")
    request = command.Request(**{name: getattr(arguments, name) for name in names})
    cfg = command.config_of(config, arguments)
    if arguments.target == "cpu" and arguments.search and arguments.confirm:
        _start(f"data={command.devices_of('cpu', arguments.chips)}")
    elif arguments.stablehlo or (
        arguments.target == "cpu" and not (arguments.search or arguments.compare)
    ):
        _start(cfg.mesh)
    if arguments.stablehlo:
        from v4jax.planner.portable import write_stablehlo

        return write_stablehlo(arguments.stablehlo, cfg, command.checked(cfg, request).hardware)
    if arguments.compare:
        result = command.compare(cfg, request, arguments.compare)
    elif arguments.search:
        result = command.look_for(cfg, request, arguments.chips, arguments.confirm)
    else:
        result = command.examine(cfg, request)
    if arguments.report:
        from v4jax.planner.page import report

        report(arguments.report, cfg, request, result)
    if arguments.json:
        return result.to_dict()
    _print_rows(result.rows())
    for line in result.lines():
        print(line)
    return None


def _measure(path: str) -> dict:
    """Measures this machine and writes its CPU profile to `path`."""
    _start("data=8")
    from v4jax.planner.measure import measure

    found = measure()
    pathlib.Path(path).write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    return found


RUNS = {
    "train": _train,
    "plot": _plot,
    "generate": _generate,
    "chat": _chat,
    "score": _score,
    "convert": _convert,
    "cost": _cost,
    "layout": _layout,
}
"""Command -> the function that runs it.

It gets the flags, and the arguments that the parser did not know (train's overrides).
"""


def _launch(arguments, command: list[str]) -> int:
    from v4jax.launch import launch

    return launch(command, arguments.processes, arguments.devices, arguments.output)


# ---- parts ---------------------------------------------------------------------------------------


def _read_config_file(path):
    """Calls `get_config()` of a Python file."""
    from v4jax.python_files import call
    from v4jax.train.config import TrainConfig

    found = call(path, "get_config")
    if not isinstance(found, TrainConfig):
        kind = type(found).__name__
        raise BadInput(
            f"{path}: get_config() gave {kind}; must give a v4jax.train.config.TrainConfig"
        )
    return found


def _override(cfg, rest: list[str], program: str):
    """The config with typed command-line overrides; a bad one is one line on stderr."""
    import tyro

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
        inner = field.default if dataclasses.is_dataclass(field.default) else field.type
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            found += _fields(inner, f"{head}{field.name}.")
        elif dataclasses.is_dataclass(inner):
            found += _fields(type(inner), f"{head}{field.name}.")
        else:
            found.append(f"{head}{field.name}")
    return found


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


def _start(mesh: str | None, preemptible: bool = False) -> None:
    """Prepares devices before JAX is used.

    Simulates devices where that is allowed, and joins the job that the environment describes.
    """
    from sharding.mesh import parse_mesh, simulate_devices
    from sharding.processes import start

    simulate_devices(math.prod(parse_mesh(mesh).values()))
    start(preemptible)


def _print(result: dict, as_json: bool) -> None:
    if as_json:
        from v4jax.checkpoint.atomic import json_text

        print(json_text(result))
        return
    for name, value in result.items():
        print(f"{name}: {value}")


def _print_rows(rows) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    table = Table(show_header=False, box=None)
    for _ in rows[0]:
        table.add_column(overflow="fold")  # whole names, even on a narrow terminal
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)
