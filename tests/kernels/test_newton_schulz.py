"""Each implementation of a Newton-Schulz step gives the equation's products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import muon as reference

from v4jax.kernels.newton_schulz.op import IMPLEMENTATIONS, newton_schulz_step
from v4jax.kernels.newton_schulz.products_tpu import Sizes, symmetric
from v4jax.train.newton_schulz import COEFFICIENTS, newton_schulz

each = pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
ABC = jnp.asarray(COEFFICIENTS[0], jnp.float32)


def stack(shape) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=(-2, -1), keepdims=True)


@each
@pytest.mark.parametrize("shape", [(2, 24, 40), (1, 8, 32), (3, 5, 7), (1, 40, 40)])
def test_a_step_is_the_equation(implementation, shape):
    x = stack(shape)
    gram = (wide := x.astype(np.float64)) @ wide.swapaxes(-1, -2)
    a, b, c = COEFFICIENTS[0]
    want = a * wide + (b * gram + c * gram @ gram) @ wide
    got, factor = newton_schulz_step(jnp.asarray(x), jnp.asarray(x), ABC, implementation)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)
    np.testing.assert_array_equal(factor, got)


def test_factors_in_bfloat16_are_rounded_alike():
    """Both round Gram matrix and polynomial; sums in another order move a rounding now and then."""
    x = jnp.asarray(stack((2, 24, 40)))
    (want, _), (got, factor) = (
        newton_schulz_step(x, x.astype(jnp.bfloat16), ABC, name) for name in IMPLEMENTATIONS
    )
    np.testing.assert_allclose(got, want, atol=2**-8 * float(jnp.abs(want).max()) / 4)
    assert got.dtype == jnp.float32 and factor.dtype == jnp.bfloat16
    np.testing.assert_array_equal(factor, got.astype(jnp.bfloat16))


def test_a_long_sum_comes_in_parts(monkeypatch):
    monkeypatch.setattr("v4jax.kernels.newton_schulz.products_tpu.SUMMED", 16)
    x = jnp.asarray(stack((2, 24, 40)))
    first, second = symmetric(Sizes(8, 8, True), x, None, jnp.array([0.0, 1.0]), keep=True)
    np.testing.assert_allclose(first, np.asarray(x) @ np.swapaxes(x, -1, -2), atol=1e-6)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, np.swapaxes(first, -1, -2))


@pytest.mark.parametrize("shape", [(2, 3, 6, 10), (12, 5)])
def test_all_steps_orthogonalise(shape):
    x = 1e-12 * stack(shape)
    got = np.asarray(newton_schulz(jnp.asarray(x), implementation="pallas_tpu"))
    flat = x.reshape(-1, *shape[-2:])
    for one, result in zip(flat, got.reshape(flat.shape), strict=True):
        np.testing.assert_allclose(result, reference.hybrid_newton_schulz(one), atol=2e-5)


def test_what_the_kernels_do_not_take_is_refused(monkeypatch):
    monkeypatch.setattr("v4jax.kernels.newton_schulz.op.on_tpu", lambda: True)
    x = jax.ShapeDtypeStruct((1, 100, 256), jnp.float32)
    with pytest.raises(ValueError, match="newton_schulz: got 'pallas_tpu' for matrices of 100 x"):
        jax.eval_shape(lambda x: newton_schulz_step(x, x, ABC, "pallas_tpu"), x)
