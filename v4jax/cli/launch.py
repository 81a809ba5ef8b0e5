"""`v4jax launch`: one JAX job of several local processes.

Next file to read: v4jax/launch.py.
"""

import argparse


def declare(sub: argparse.ArgumentParser) -> None:
    """Declares how many processes and devices."""
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


def run(arguments: argparse.Namespace, command: list[str]) -> int:
    """Runs `command` as one job; returns its exit code."""
    from v4jax.launch import launch

    return launch(command, arguments.processes, arguments.devices, arguments.output)
