"""Each implementation of the pooling has values and gradients of the equation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import compressor
from trees import close

from v4jax.kernels.pooling import IMPLEMENTATIONS, Gated, pooling

each = pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])


def inputs(rows, width, size, seed=0):
    """(c, z [2,rows,width], ape [size,width])."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (2, rows, width), (2, rows, width), (size, width)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def overlapping(c, z, ape, start=None, implementation=None):
    """Entries as CSA makes them: channels of the window before, and a window's own."""
    half, size = c.shape[-1] // 2, len(ape)
    windows = c.shape[1] // size if start is None else start.shape[1]
    early = [jnp.pad(x[..., :half], ((0, 0), (size, 0), (0, 0))) for x in (c, z)]
    before, own = Gated(*early, ape[:, :half]), Gated(c[..., half:], z[..., half:], ape[:, half:])
    there = jnp.arange(windows)[None] > 0 if start is None else start >= size
    return pooling(own, before, there, start, implementation)


def apart(c, z, ape, start=None, implementation=None):
    """Entries as HCA makes them."""
    windows = c.shape[1] // len(ape) if start is None else start.shape[1]
    return pooling(Gated(c, z, ape), None, jnp.ones((1, windows), bool), start, implementation)


@pytest.mark.parametrize("form", [overlapping, apart])
@each
def test_pooling_has_values_and_gradients_of_the_equation(implementation, form):
    """Windows follow each other, and the last tokens fill none."""
    args = inputs(14, 6, 4)
    want, want_pull = jax.vjp(lambda *x: form(*x, implementation="reference"), *args)
    got, pull = jax.vjp(lambda *x: form(*x, implementation=implementation), *args)
    ct = jnp.cos(want)
    close((got, pull(ct)), (want, want_pull(ct)))
    equation = compressor._pool_overlapping if form is overlapping else compressor._pool_apart
    c, z, ape = (np.asarray(x, np.float64) for x in args)
    close(got, np.stack([equation(c[b], z[b], ape) for b in range(2)]))


@pytest.mark.parametrize("form", [overlapping, apart])
@pytest.mark.parametrize("batch", [1, 2])
def test_windows_may_begin_anywhere(form, batch):
    """Windows of each row, or the same of all rows, are those of rows that begin there."""
    c, z, ape = inputs(14, 6, 4)
    start = jnp.asarray([[4, 9], [6, 10]][:batch])
    got = form(c, z, ape, start)
    for b in range(2):
        for i, first in enumerate(np.asarray(start)[b % batch]):
            part = (x[b : b + 1, first - 4 : first + 4] for x in (c, z))
            np.testing.assert_allclose(got[b, i], form(*part, ape)[0, 1], atol=2e-6)


def test_aligned_needs_windows_that_follow_each_other():
    c, z, ape = inputs(14, 6, 4)
    with pytest.raises(ValueError, match="pooling: got 'aligned' for windows that may begin any"):
        apart(c, z, ape, jnp.zeros((1, 2), jnp.int32), "aligned")
