"""Cuts the batch into micro-batches and joins them again; every device keeps its own rows.

Row r of device d goes to micro-batch r // size, so no row travels. Example: 8 rows on 2 devices in
2 micro-batches: [0 1 2 3 | 4 5 6 7] becomes [0 1 | 4 5] and [2 3 | 6 7].

Next file to read: sharding/manual.py.
"""

import jax
import jax.numpy as jnp

from sharding.rules import AxisRules


def split_rows(rules: AxisRules, x: jax.Array, count: int, axis: int = 0) -> jax.Array:
    """[..., B, ...] -> [count, ..., B / count, ...]: micro-batches on a new first axis.

    Args:
      axis: that of the rows, which must divide by count times the devices that cut the batch; the
        axis after it is the sequence.
    """
    devices, rest = rules.shards("act_batch"), x.shape[axis + 1 :]
    x = x.reshape(*x.shape[:axis], devices, count, -1, *rest)
    x = jnp.moveaxis(x, axis + 1, 0)
    x = x.reshape(count, *x.shape[1 : axis + 1], -1, *rest)
    return _place(rules, x, axis + 1)


def join_rows(rules: AxisRules, x: jax.Array, axis: int = 0) -> jax.Array:
    """The inverse of `split_rows`; `axis` is that of the rows in the result."""
    devices, count, rest = rules.shards("act_batch"), x.shape[0], x.shape[axis + 2 :]
    x = x.reshape(count, *x.shape[1 : axis + 1], devices, -1, *rest)
    x = jnp.moveaxis(x, 0, axis + 1)
    return _place(rules, x.reshape(*x.shape[:axis], -1, *rest), axis)


def _place(rules: AxisRules, x: jax.Array, axis: int) -> jax.Array:
    names: list[str | None] = [None] * x.ndim
    names[axis], names[axis + 1] = "act_batch", "act_seq"
    return rules.constrain(x, *names)
