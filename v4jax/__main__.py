"""Makes `python -m v4jax` the same as `v4jax`."""

from v4jax.cli.main import entry

entry()
