"""The command line: parses, calls, prints. Exit code 0: done; 2: bad input, one line on stderr; 1: failed while running.

Next file to read: README.md, which shows every command.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import pathlib
import re
import sys
import traceback


class BadInput(Exception):
    """A line for stderr, and exit code 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message}; see {self.prog} --help")


def main(argv: list[str] | None = None) -> int:
    """Runs one command and gives its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(argv)
    except (BadInput, ValueError) as error:
        print(f"v4jax: {_one_line(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("v4jax: interrupted", file=sys.stderr)
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
    if argv[:1] == ["launch"] and "--" in argv:  # what follows is not ours to parse
        command = argv[argv.index("--") + 1 :]
        argv = argv[: argv.index("--")]
    arguments, rest = _parser().parse_known_args(argv)
    if rest and arguments.command != "train":
        raise BadInput(f"unknown argument {rest[0]!r}; see v4jax {arguments.command} --help")
    if arguments.command == "launch":
        return _launch(arguments, command)
    result = arguments.run(arguments, rest)
    if result is not None:
        _print(result, arguments.json)
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="v4jax", description="DeepSeek-V4 in JAX: train, plot, generate, chat, score, convert, cost, layout, launch.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    def command(name, run, text):
        sub = commands.add_parser(name, help=text, description=text, add_help=name != "train")
        sub.add_argument("--json", action="store_true", help="print the result as one JSON object")
        sub.set_defaults(run=run)
        return sub

    def on_mesh(sub):
        sub.add_argument("--mesh", help="for example data=2,expert=4 (axes: slice, data, fsdp, context, expert, tensor)")
        sub.add_argument("--layout", help="sharding layout (default: full)")
        sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype")

    def continues(sub, tokens):
        sub.add_argument("--max-new-tokens", type=int, default=tokens)
        sub.add_argument("--temperature", type=float, default=0.0, help="0 (the default) takes the likeliest token")
        sub.add_argument("--top-p", type=float, default=1.0)
        sub.add_argument("--top-k", type=int, default=0)
        sub.add_argument("--min-p", type=float, default=0.0)
        sub.add_argument("--quant", default="none", choices=("none", "official"), help="official: compute as the served model does")
        sub.add_argument("--cache", default="dtype", choices=("dtype", "official"), help="official (and --quant so): fp8 and MXFP4")
        sub.add_argument("--cache-tokens", type=int, help="room of the cache (default: what is needed; of a chat, 4096)")
        on_mesh(sub)

    train = command("train", _train, "Train, or resume, the run that CONFIG.py describes.")
    train.add_argument("config", nargs="?")
    train.add_argument("--dry-run", action="store_true", help="print the plan, stage by stage, and run nothing")

    plot = command("plot", _plot, "Write RUN/summary.html, one page about a run, also while it runs.")
    plot.add_argument("run_dir", metavar="RUN")

    generate = command("generate", _generate, "Continue a prompt.")
    generate.add_argument("checkpoint")
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text (needs tokenizer.json in the checkpoint)")
    source.add_argument("--tokens", help="token ids, for example 0,17,4")
    generate.add_argument("--seed", type=int, default=0, help="of the first sample; the others count up from it")
    generate.add_argument("--samples", type=int, default=1, help="continuations of the prompt")
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (may be repeated)")
    generate.add_argument("--stop-tokens", help="end before one of these ids instead of the end-of-text token")
    generate.add_argument("--speculative", action="store_true", help="draft with MTP: the same tokens in fewer steps")
    continues(generate, 64)

    chat = command("chat", _chat, "Talk: a line of the input is a turn, its end (Ctrl-D) ends.")
    chat.add_argument("checkpoint", help="with the tokenizer of a DeepSeek-V4 release, or 'byte-chat'")
    chat.add_argument("--thinking", default="chat", choices=("chat", "thinking"))
    chat.add_argument("--effort", help="of thinking: high, max (0731: low, high, max)")
    chat.add_argument("--release", default="v4", choices=("v4", "0731"), help="whose words ask for effort")
    chat.add_argument("--system", metavar="TEXT", help="opens the conversation")
    chat.add_argument("--seed", type=int, default=0)
    continues(chat, 512)

    score = command("score", _score, "Logits and loss of every token of a .npy file.")
    score.add_argument("checkpoint")
    score.add_argument("--tokens", required=True, help=".npy file, integers [B, S]")
    score.add_argument("--out", required=True, help=".npz file to write")
    score.add_argument("--quant", default="none", choices=("none", "official"))
    on_mesh(score)

    convert = command("convert", _convert, "Convert between safetensors and the v4jax store.")
    convert.add_argument("source")
    convert.add_argument("target")
    convert.add_argument("--format", choices=("orbax", "safetensors"), default="safetensors")
    convert.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "fp8", "official"))
    convert.add_argument("--verify", action="store_true", help="compare TARGET with SOURCE tensor by tensor (made first if it is not there)")
    convert.add_argument("--max-file-bytes", type=int, default=5 * 10**9, help="of a safetensors file")
    convert.add_argument("--workers", type=int, default=2, help="tensors or files converted at a time; each takes memory for one")

    cost = command("cost", _cost, "Parameters, FLOPs per token and cache bytes, from the configuration alone.")
    cost.add_argument("config", help="CONFIG.py or config.json")
    cost.add_argument("--context", type=int, help="tokens in the sequence (default: max_position_embeddings)")

    layout = command("layout", _layout, "What a layout holds, sends and takes: on paper, and compiled for devices that need not exist.")
    layout.add_argument("config", nargs="?", help="CONFIG.py or config.json")
    layout.add_argument("--mesh", help="for example fsdp=8,expert=16 (default: that of CONFIG.py)")
    layout.add_argument("--layout", help="sharding layout (default: that of CONFIG.py, or full)")
    layout.add_argument("--target", default="cpu", help="cpu; a TPU topology such as v5p:4x4x8 (extra `tpu`); h100:N (extra `gpu`); on paper "
                        "cloudmatrix384:1024, my-chip.json:16 and others (v4jax/layout/hardware.json)")  # fmt: skip
    layout.add_argument("--what", choices=("train", "decode"), default="train", help="the step: training, or one new token a row (on paper)")
    layout.add_argument("--seq", type=int, help="tokens a row")
    layout.add_argument("--batch", type=int, help="rows a step (default: one a device)")
    layout.add_argument("--fp8", action="store_true", help="estimate with products at the fp8 rate")
    layout.add_argument("--released", action="store_true", help="decode from weights in the released formats (fp8, MXFP4)")
    layout.add_argument("--paper", action="store_true", help="compile nothing")
    layout.add_argument("--lower-only", action="store_true", help="stop before compiling: seconds instead of minutes for a full model")
    layout.add_argument("--search", action="store_true", help="rank every layout and mesh of --chips chips on paper")
    layout.add_argument("--chips", type=int, help="chips to search on (default: as many as the target names)")
    layout.add_argument("--confirm", type=int, default=0, metavar="K", help="compile the best K of the search")
    layout.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two layouts side by side, each LAYOUT:MESH")
    layout.add_argument("--report", metavar="OUT.html", help="write one page that works offline (of a search: of its winner)")
    layout.add_argument("--stablehlo", metavar="OUT", help="write the step as a portable module (extra `export`); nothing else is done")
    layout.add_argument("--measure", metavar="OUT.json", help="measure this machine and write it as a hardware profile; no CONFIG")

    launch = command("launch", _launch, "Run -- COMMAND as one JAX job of local processes on simulated CPU devices.")
    launch.add_argument("--processes", type=int, required=True, help="local processes")
    launch.add_argument("--devices", type=int, required=True, help="simulated devices of each process")
    launch.add_argument("--output", choices=("all", "first"), default="all",
                        help="all: every process's lines after [i]; first: those of process 0, as they are")  # fmt: skip
    return parser


# ---- commands: everything heavy is imported inside, so that --help and bad flags answer at once -------------------------


def _train(arguments, rest):
    if arguments.config is None or arguments.config in ("-h", "--help"):
        raise BadInput("train needs a CONFIG.py; see v4jax train CONFIG.py --help for its overrides")
    cfg = _override(_read_config_file(arguments.config), rest, f"v4jax train {arguments.config}")
    if arguments.dry_run:
        return _plan(cfg, arguments.json)
    _start(cfg.mesh, preemptible=True)
    from v4jax.train.loop import train

    summary = train(cfg)
    if cfg.sample_tokens and "stopped_at" not in summary:
        summary |= _sample(cfg)
    if "run_dir" not in summary:  # not the first of several processes
        return None
    return summary | {"peak_memory": f"{_peak_memory() / 1e9:.1f} GB"}


def _plan(cfg, as_json: bool) -> dict | None:
    from v4jax.layout.plan import HEAD, as_dict, plan

    if as_json:
        return as_dict(cfg)
    _print_rows([HEAD, *(stage.row() for stage in plan(cfg))])
    return None


def _peak_memory() -> int:
    """The most bytes this process ever held resident."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _sample(cfg) -> dict:
    """What the finished run says after cfg.sample_prompt; in sample.txt too."""
    import jax

    from sharding.processes import is_first
    from v4jax.api import load, place_on
    from v4jax.generate.decode import Setting, generate
    from v4jax.generate.sampling import Sampling
    from v4jax.generate.text import TextStop
    from v4jax.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(cfg.run_dir)
    model, params = load(cfg.run_dir, mesh=cfg.mesh, layout=cfg.layout)
    mesh, rules = place_on(cfg.mesh, cfg.layout)
    prompt = [tokenizer.bos_token_id] + tokenizer.encode(cfg.sample_prompt)
    with jax.set_mesh(mesh):
        (completion,) = generate(
            model, params, [prompt], cfg.sample_tokens, seeds=[cfg.seed],
            setting=Setting(rules=rules, dtype=cfg.dtype, sampling=Sampling(temperature=0.7)),
        )  # fmt: skip
    text = cfg.sample_prompt + TextStop([model.eos_token_id], tokenizer=tokenizer).text(completion.tokens)
    if not is_first():
        return {}
    (pathlib.Path(cfg.run_dir) / "sample.txt").write_text(text)
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
        arguments.checkpoint, arguments.tokens, arguments.out, arguments.mesh, arguments.layout, arguments.dtype,
        arguments.quant,
    )  # fmt: skip
    return result if is_first() else None


def _convert(arguments, _):
    from v4jax.convert import compare, convert

    result = {}
    if not arguments.verify or not pathlib.Path(arguments.target).exists():
        result = convert(
            arguments.source, arguments.target, arguments.format, arguments.dtype, arguments.max_file_bytes, arguments.workers
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
    from v4jax.layout import command

    names = ("target", "what", "paper", "lower_only", "fp8", "released")
    request = command.Request(**{name: getattr(arguments, name) for name in names})
    cfg = command.config_of(config, arguments)
    if arguments.stablehlo or (arguments.target == "cpu" and not (arguments.search or arguments.compare)):
        _start(cfg.mesh)
    if arguments.stablehlo:
        from v4jax.layout.portable import write_stablehlo

        return write_stablehlo(arguments.stablehlo, cfg, command.checked(cfg, request).hardware)
    if arguments.compare:
        result = command.compare(cfg, request, arguments.compare)
    elif arguments.search:
        result = command.look_for(cfg, request, arguments.chips, arguments.confirm)
    else:
        result = command.look(cfg, request)
    if arguments.report:
        from v4jax.layout.page import report

        report(arguments.report, cfg, request, result)
    if arguments.json:
        return result.to_dict()
    _print_rows(result.rows())
    for line in result.lines():
        print(line)
    return None


def _measure(path: str) -> dict:
    """The CPU profile of this machine, written to `path`."""
    _start("data=8")
    from v4jax.layout.measure import measure

    found = measure()
    pathlib.Path(path).write_text(json.dumps(found, indent=1) + "\n")
    return found


def _launch(arguments, command: list[str]) -> int:
    from v4jax.launch import launch

    return launch(command, arguments.processes, arguments.devices, arguments.output)


# ---- parts -----------------------------------------------------------------------------------------------------------


def _read_config_file(path):
    """`get_config()` of a Python file, run with its own directory's parent importable (so configs import each other)."""
    path = pathlib.Path(path)
    if path.suffix != ".py" or not path.is_file():
        raise BadInput(f"{path}: no such CONFIG.py; it must be a Python file with get_config()")
    root = str(path.resolve().parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise BadInput(f"{path}: has no function get_config()")
    return module.get_config()


def _override(cfg, rest: list[str], program: str):
    """The config with typed command-line overrides; an unknown or ill-typed one is one line."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(type(cfg), default=cfg, args=rest, prog=program)
    except SystemExit as stop:
        if not stop.code:
            raise
        words = re.sub(r"[─-╿]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue()))
        raise BadInput(words or "bad override") from None


def _start(mesh: str | None, preemptible: bool = False) -> None:
    """Before JAX is used: simulates devices where it may, and joins the job that the environment describes."""
    from sharding.mesh import parse_mesh, simulate_devices
    from sharding.processes import start

    simulate_devices(math.prod(parse_mesh(mesh).values()))
    start(preemptible)


def _print(result: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name}: {value}")


def _print_rows(rows) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    table = Table(show_header=False, box=None)
    for _ in rows[0]:
        table.add_column(overflow="fold")  # whole names, also where lines are short
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)
