"""Writes lines about a command's work to stderr; stdout is for its result.

Next file to read: v4jax/storage/local.py.
"""

import sys

from sharding.processes import is_first


def say(*lines: str) -> None:
    """Prints each line that is not empty to stderr, in the first process of a job."""
    for line in filter(None, lines if is_first() else ()):
        print(f"v4jax: {line}", file=sys.stderr, flush=True)
