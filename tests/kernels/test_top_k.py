"""Each implementation finds the k best of lax.top_k and of a stable sort, ties included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import indexer

from v4jax.kernels.top_k import IMPLEMENTATIONS, top_k, top_k_mask

each = pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])


@each
def test_the_mask_of_the_largest_at_its_extremes(implementation):
    """The scores are negative, two zeros, infinities; or all entries are chosen."""
    score = jnp.array([[[-3.0, 0.0, -0.0, -jnp.inf, 2.5, jnp.inf, -1e-40, 2.5]]])
    order = np.argsort(-np.asarray(score[0, 0]), kind="stable")  # 0 and -0 are a tie
    for k in range(1, 9):
        chosen = np.flatnonzero(top_k_mask(score, k, implementation)[0, 0])
        np.testing.assert_array_equal(chosen, np.sort(order[:k]))
        np.testing.assert_array_equal(chosen, indexer.top_k(np.asarray(score[0, 0]), k))


@each
def test_the_smaller_index_wins_a_tie(implementation):
    score = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 5, 40)).astype(np.float32))
    chosen = jax.nn.one_hot(jax.lax.top_k(score, 7)[1], 40, dtype=bool).any(-2)
    np.testing.assert_array_equal(top_k_mask(score, 7, implementation), chosen)


def test_more_slots_than_the_kernel_takes_are_refused():
    score = jax.ShapeDtypeStruct((1, 1, 2**16 + 1), jnp.float32)
    with pytest.raises(ValueError, match="top_k: got 'pallas_tpu' for 65537 slots; must be at mo"):
        jax.eval_shape(lambda score: top_k_mask(score, 4, "pallas_tpu"), score)


@pytest.mark.parametrize(
    ("slots", "k", "kinds"),
    [(7, 7, 9), (33, 5, 3), (100, 1, 9), (500, 3, 2), (1000, 128, 20), (4100, 16, 300)],
)
@each
def test_the_best_are_those_of_lax_top_k(implementation, slots, k, kinds):
    """Also with ties and with rows that see fewer than k entries; gradients too.

    The number of entries is no multiple of a group or a word.
    """
    best_of = functools.partial(top_k, k=k, implementation=implementation)
    rng = np.random.default_rng(slots)
    score = rng.integers(0, kinds, (2, 9, slots)).astype(np.float32)
    score[:, :, rng.permutation(slots)[: slots // 3]] = -np.inf
    score[1, 4, 1:] = -np.inf
    best, slot = jax.jit(best_of)(score)
    np.testing.assert_array_equal(np.sort(slot, -1), np.sort(jax.lax.top_k(score, k)[1], -1))
    np.testing.assert_array_equal(best, np.take_along_axis(score, np.asarray(slot), -1))
    finite = jnp.asarray(rng.normal(size=(1, 9, slots)).astype(np.float32))

    def total(top):
        return jax.grad(lambda s: jnp.sum(jnp.sin(top(s)[0])))(finite)

    np.testing.assert_array_equal(total(best_of), total(lambda s: jax.lax.top_k(s, k)))
