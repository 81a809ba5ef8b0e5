"""The command line: parses, calls, prints.

Exit code 0: done; 1: failed while running; 2: bad input, one line on stderr.

Next file to read: v4jax/cli/commands.py.
"""

import os
import shlex
import sys
import traceback

from v4jax.cli import launch
from v4jax.cli.arguments import BadInput, with_flags
from v4jax.cli.commands import COMMANDS, command_help, parser
from v4jax.cli.printing import print_result


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
    command: list[str] = []
    if argv[:1] == ["launch"] and "--" in argv:  # what follows -- is another program's
        command = argv[argv.index("--") + 1 :]
        argv = argv[: argv.index("--")]
    if argv[:1] and argv[0] in ("generate", "chat", "score"):
        argv = with_flags(argv)
    arguments, rest = parser().parse_known_args(argv)
    if rest and arguments.command == "launch" and not rest[0].startswith("-"):
        raise BadInput(
            "launch: the command goes after --: v4jax launch --processes "
            f"{arguments.processes} --devices {arguments.devices} -- {shlex.join(rest)}"
        )
    if rest and arguments.command != "train":
        raise BadInput(f"unknown argument {rest[0]!r}; see v4jax {arguments.command} --help")
    if arguments.command == "launch":
        return launch.run(arguments, command)
    if arguments.command == "train" and arguments.config is None and {"-h", "--help"} & set(rest):
        print(command_help("train"))
        return 0
    if getattr(arguments, "layout", None):
        from v4jax.python_files import read_layout

        arguments.layout = read_layout(arguments.layout)
    run = COMMANDS[arguments.command][2]
    result = run(arguments, rest)
    if result is not None:
        print_result(result, arguments.json)
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
