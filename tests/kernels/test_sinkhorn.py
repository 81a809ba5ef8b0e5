"""Each implementation of Sinkhorn's iterations has values and gradients of the divisions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import hyper
from trees import close, small_config

from v4jax.kernels.sinkhorn import IMPLEMENTATIONS, sinkhorn

each = pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])


@each
def test_sinkhorn_is_doubly_stochastic(implementation):
    """Columns are divided last, so they are exact but for eps.

    Rows are as near as 20 iterations bring logits of this scale.
    """
    logits = jax.random.normal(jax.random.key(0), (4, 4, 100))
    comb = sinkhorn(logits, 20, 1e-6, implementation)
    np.testing.assert_allclose(comb.sum(0), 1, atol=1e-5)
    np.testing.assert_allclose(comb.sum(1), 1, atol=1e-4)
    assert float(comb.min()) > 0


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@each
def test_sinkhorn_has_values_and_gradient_of_its_divisions(implementation, eps):
    # The second half has nearly empty columns.
    logits = (
        3 * jax.random.normal(jax.random.key(0), (4, 4, 20))
        - 20 * jnp.eye(4)[0][None, :, None] * (jnp.arange(20) > 9)[None, None]
    )
    value, pull = jax.vjp(lambda logits: sinkhorn(logits, 6, eps, "reference"), logits)
    got, got_pull = jax.vjp(lambda logits: sinkhorn(logits, 6, eps, implementation), logits)
    ct = jax.random.normal(jax.random.key(1), value.shape)
    close((got, got_pull(ct)), (value, pull(ct)))
    cfg = small_config(hc_mult=4, hc_sinkhorn_iters=6, hc_eps=eps)
    close(jnp.moveaxis(got, 2, 0), hyper.sinkhorn(cfg, np.moveaxis(np.asarray(logits), 2, 0)))


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="sinkhorn: got 'fast'; must be one of reference, factors"):
        sinkhorn(jnp.zeros((2, 2, 1)), 1, 1e-6, "fast")
