"""Each implementation of the rotation has values and gradients of complex products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import rotary
from trees import close

from v4jax.kernels.rotate import IMPLEMENTATIONS, Rotation, rotate

each = pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])


@pytest.mark.parametrize("inverse", [False, True])
@each
def test_rotate_has_the_gradient_of_complex_products(implementation, inverse):
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 10))
    frequencies = np.asarray([0.7, 0.2])
    angle = (np.arange(5)[:, None] * frequencies)[None, :, None]
    rope = Rotation(jnp.float32(np.cos(angle)), jnp.float32(np.sin(angle)))
    value, pull = jax.vjp(lambda x: rotate(x, rope, inverse, "reference"), x)
    got, got_pull = jax.vjp(lambda x: rotate(x, rope, inverse, implementation), x)
    ct = jax.random.normal(jax.random.key(2), value.shape)
    close((got, got_pull(ct)), (value, pull(ct)))
    for b in range(2):
        close(got[b], rotary.rotate(np.asarray(x[b]), np.arange(5), frequencies, inverse))


@each
def test_the_gradient_is_the_inverse_rotation(implementation):
    x, ct = (jax.random.normal(jax.random.key(i), (4, 6)) for i in range(2))
    angle = jax.random.normal(jax.random.key(2), (4, 2))
    rope = Rotation(jnp.cos(angle), jnp.sin(angle))
    _, pull = jax.vjp(lambda x: rotate(x, rope, implementation=implementation), x)
    close(pull(ct)[0], rotate(ct, rope, True, implementation))
