"""`python -m v4jax` is `v4jax`."""

from v4jax.cli import entry

entry()
