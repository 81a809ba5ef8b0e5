"""Running sums of counts as matrix products: exact, and fast to compile and run on every platform.

XLA:TPU takes seconds to compile one sort or one long cumsum, and a model has dozens of them. A
product with a triangle of ones compiles in a fraction of that (docs/reports/2026-11.md).

Shapes: A elements, K kinds.

Next file to read: sharding/exchange.py.
"""

import jax
import jax.numpy as jnp

_BLOCK = 128


def running_sum(x_AK: jax.Array) -> jax.Array:
    """y[..., n, e] = sum of x[..., m, e] over m <= n, in float32.

    Exact for integers whose sums stay below 2^24.
    """
    *lead, n, width = x_AK.shape
    blocks = -(-n // _BLOCK)
    x_AK = jnp.pad(
        x_AK.astype(jnp.float32), [(0, 0)] * len(lead) + [(0, blocks * _BLOCK - n), (0, 0)]
    )
    x = x_AK.reshape(*lead, blocks, _BLOCK, width)
    inner = _product(jnp.tril(jnp.ones((_BLOCK, _BLOCK), jnp.float32)), x)
    before = _product(jnp.tril(jnp.ones((blocks, blocks), jnp.float32), -1), inner[..., -1, :])
    return (inner + before[..., None, :]).reshape(*lead, blocks * _BLOCK, width)[..., :n, :]


def _product(ones, x):
    return jnp.einsum("ij,...je->...ie", ones, x, precision=jax.lax.Precision.HIGHEST)


def ranks(index_A: jax.Array, kinds: int) -> tuple[jax.Array, jax.Array]:
    """How many earlier elements equal each element, and how many elements there are of each kind.

    Elements outside [0, kinds) are not counted and have rank 0. With a running sum of the counts
    this is a stable sort.

    Example: index [1, 0, 1] and 2 kinds give rank [0, 0, 1] and count [1, 2].

    Returns:
      (rank int32 [A], count int32 [K]).
    """
    hot_AK = jax.nn.one_hot(index_A, kinds)
    total_AK = running_sum(hot_AK)
    rank_A = jnp.sum(jnp.where(hot_AK > 0, total_AK - 1, 0), axis=-1)
    return rank_A.astype(jnp.int32), total_AK[-1].astype(jnp.int32)
