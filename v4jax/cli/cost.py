"""`v4jax cost`: what a model holds and computes.

Next file to read: v4jax/cost.py.
"""

import argparse
import pathlib

from v4jax.cli.arguments import CHECKPOINT
from v4jax.cli.config_file import read_config_file
from v4jax.cli.printing import print_rows


def declare(sub: argparse.ArgumentParser) -> None:
    """Declares the configuration and a length."""
    sub.add_argument("config", type=CHECKPOINT, help="CONFIG.py, config.json or a model of the Hub")
    sub.add_argument(
        "--context", type=int, help="tokens in the sequence (default: max_position_embeddings)"
    )


def run(arguments: argparse.Namespace, _: list[str]) -> dict | None:
    """Counts, and prints a table."""
    from v4jax.config import ModelConfig
    from v4jax.cost import cost

    path = pathlib.Path(arguments.config)
    is_python = path.suffix == ".py"
    model = read_config_file(path).model if is_python else ModelConfig.from_json(arguments.config)
    result = cost(model, arguments.context)
    if arguments.json:
        return result.to_dict()
    print_rows(result.rows())
    return None
