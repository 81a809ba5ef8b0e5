"""Collapse and expansion of the streams have values and gradients of their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import hyper
from trees import close

from v4jax.kernels.streams import IMPLEMENTATIONS, collapse, expand

each = pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def wide(x):
    return np.asarray(x[0], np.float64)


@each
def test_collapse_has_values_and_gradient_of_its_formula(implementation):
    pre, x = normal(0, 2, 3, 4), normal(1, 2, 3, 4, 8)
    value, pull = jax.vjp(lambda *args: collapse(*args, "reference"), pre, x)
    got, got_pull = jax.vjp(lambda *args: collapse(*args, implementation), pre, x)
    close((got, got_pull(value)), (value, pull(value)))
    close(got[0], hyper.collapse(wide(pre), wide(x)))


@each
def test_expand_has_values_and_gradient_of_its_formula(implementation):
    args = normal(0, 2, 3, 8), normal(1, 2, 3, 4, 8), normal(2, 2, 3, 4), normal(3, 2, 3, 4, 4)
    value, pull = jax.vjp(lambda *args: expand(*args, "reference"), *args)
    got, got_pull = jax.vjp(lambda *args: expand(*args, implementation), *args)
    ct = normal(4, *value.shape)
    close((got, got_pull(ct)), (value, pull(ct)))
    y, x, post, comb = map(wide, args)
    close(got[0], hyper.expand(hyper.Mix(post, post, comb), y, x))


@each
def test_streams_keep_their_dtype(implementation):
    """Sums are float32, so all round about the same numbers to bfloat16."""
    pre, x = normal(0, 2, 3, 4), normal(1, 2, 3, 4, 8).astype(jnp.bfloat16)
    got = collapse(pre, x, implementation)
    assert got.dtype == jnp.bfloat16
    # One step of bfloat16, where a sum lies near the middle of two numbers.
    np.testing.assert_allclose(
        got.astype(jnp.float32), collapse(pre, x, "reference").astype(jnp.float32), rtol=2**-7
    )
