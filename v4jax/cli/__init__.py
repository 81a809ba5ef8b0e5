"""The command line of v4jax.

Next file to read: v4jax/cli/main.py.
"""

from v4jax.cli.main import entry

__all__ = ["entry"]
