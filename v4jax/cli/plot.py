"""`v4jax plot`: one page about a run.

Next file to read: v4jax/train/picture.py.
"""

import argparse

from v4jax.cli.arguments import PLACE


def declare(sub: argparse.ArgumentParser) -> None:
    """Declares the run."""
    sub.add_argument("run_dir", metavar="RUN", type=PLACE, help="the run's folder")


def run(arguments: argparse.Namespace, _: list[str]) -> dict:
    """Writes summary.html."""
    from v4jax.train.picture import write_summary

    return {"picture": str(write_summary(arguments.run_dir))}
