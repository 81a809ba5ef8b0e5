"""Running sums of counts as matrix products: exact, and cheap to compile and run on every platform.

XLA:TPU takes 7 to 12 seconds to compile one sort of 10^4 to 10^5 elements and 2 to 4 for a long cumsum; products with a triangle
of ones take 0.3, and one model has dozens of them.

Next file to read: sharding/exchange.py.
"""

import jax
import jax.numpy as jnp

_BLOCK = 128


def running_sum(x_NE: jax.Array) -> jax.Array:
    """y[..., n, e] = sum of x[..., m, e] for m <= n, float32 [..., N, E]; exact for integers of sums below 2^24."""
    *lead, n, width = x_NE.shape
    blocks = -(-n // _BLOCK)
    x_NE = jnp.pad(
        x_NE.astype(jnp.float32), [(0, 0)] * len(lead) + [(0, blocks * _BLOCK - n), (0, 0)]
    )
    x = x_NE.reshape(*lead, blocks, _BLOCK, width)
    inner = _product(jnp.tril(jnp.ones((_BLOCK, _BLOCK), jnp.float32)), x)
    before = _product(jnp.tril(jnp.ones((blocks, blocks), jnp.float32), -1), inner[..., -1, :])
    return (inner + before[..., None, :]).reshape(*lead, blocks * _BLOCK, width)[..., :n, :]


def _product(ones, x):
    return jnp.einsum("ij,...je->...ie", ones, x, precision=jax.lax.Precision.HIGHEST)


def ranks(index_N: jax.Array, kinds: int) -> tuple[jax.Array, jax.Array]:
    """(rank [N], count [kinds]), int32: how many earlier elements equal each one, and how often each of [0, kinds) stands.

    Elements outside [0, kinds) are not counted and have rank 0. With the counts' running sum this is a stable sort.
    """
    hot_NE = jax.nn.one_hot(index_N, kinds)
    total_NE = running_sum(hot_NE)
    rank_N = jnp.sum(jnp.where(hot_NE > 0, total_NE - 1, 0), axis=-1)
    return rank_N.astype(jnp.int32), total_NE[-1].astype(jnp.int32)
