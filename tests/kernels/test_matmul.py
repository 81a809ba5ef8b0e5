"""Each implementation of x @ w has values and gradients of the product."""

import jax
import jax.numpy as jnp
import pytest
from trees import close

from v4jax.kernels.matmul import IMPLEMENTATIONS, dense

each = pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])


@pytest.mark.parametrize("shape, width", [((7, 12), 5), ((7, 5), 12), ((2, 3, 6), 6)])
@each
def test_dense_has_the_gradient_of_a_matmul(implementation, shape, width):
    x, w = (
        jax.random.normal(jax.random.key(0), shape),
        jax.random.normal(jax.random.key(1), (shape[-1], width)),
    )
    value, pull = jax.vjp(lambda x, w: x @ w, x, w)
    got, got_pull = jax.vjp(lambda x, w: dense(x, w, None, implementation), x, w)
    close((got, got_pull(value)), (value, pull(value)))


@each
def test_the_result_may_be_wider_than_the_factors(implementation):
    x = jnp.full((2, 3), 1 / 3, jnp.bfloat16)
    got = dense(x, x.T, jnp.float32, implementation)
    assert got.dtype == jnp.float32 and float(got[0, 0]) == 3 * float(x[0, 0]) ** 2
    assert dense(x, x.T, None, implementation).dtype == jnp.bfloat16
