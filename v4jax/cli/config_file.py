"""Reads the Python file of a run.

Next file to read: v4jax/python_files.py.
"""

import pathlib

from v4jax.cli.arguments import BadInput
from v4jax.python_files import call
from v4jax.train.config import TrainConfig


def read_config_file(path: str | pathlib.Path) -> TrainConfig:
    """What `get_config()` of a Python file gives."""
    found = call(path, "get_config")
    if not isinstance(found, TrainConfig):
        kind = type(found).__name__
        raise BadInput(
            f"{path}: get_config() gave {kind}; must give a v4jax.train.config.TrainConfig"
        )
    return found
