"""Each implementation of the index scores is the equation, and so is the search of a long cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import close

from v4jax.kernels.choice import Kernels
from v4jax.kernels.index_scores import IMPLEMENTATIONS, KeyReader, fold_scores, index_scores
from v4jax.kernels.index_search import best_slots, may_search

each = pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])


def inputs(batch, queries, slots):
    rng = np.random.default_rng(batch)
    shapes = (batch, queries, 5, 8), (batch, queries, 5), (batch, slots, 8)
    return [jnp.asarray(rng.normal(size=shape).astype(np.float32)) for shape in shapes]


def reader(key_BCJ, used):
    def part(first, size):
        return jax.lax.dynamic_slice_in_dim(key_BCJ, first, size, axis=1)

    return KeyReader(lambda: key_BCJ, part, key_BCJ.shape[1], jnp.int32(used))


@pytest.mark.parametrize("batch", [1, 2])
@each
def test_index_scores_have_values_and_gradients_of_the_equation(implementation, batch):
    """Relative to the largest: the sum over heads runs in another order."""
    q, w, key = inputs(batch, 9, 20)
    got, pull = jax.vjp(lambda *args: index_scores(*args, implementation), q, w, key)
    reference, reference_pull = jax.vjp(lambda *args: index_scores(*args, "reference"), q, w, key)
    ct = jnp.cos(reference)
    close((got, pull(ct)), (reference, reference_pull(ct)), 1e-5)
    want = np.zeros(got.shape)
    for i in range(5):
        dots = np.einsum("btj,bcj->btc", *(np.asarray(x, np.float64) for x in (q[:, :, i], key)))
        want += np.asarray(w)[:, :, i, None] * np.maximum(dots, 0)
    close(got, want, 1e-5)


@pytest.mark.parametrize("queries", [3, 9])  # few, and many
@each
def test_scores_in_blocks_are_those_of_all_slots(implementation, queries):
    """The last block overlaps the one before it; a block after the last slot in use is skipped."""
    q, w, key = inputs(2, queries, 20)

    def put(first, part, score):
        return jax.lax.dynamic_update_slice_in_dim(score, part, first, axis=2)

    @jax.jit
    def blocks(used):
        zeros = jnp.zeros((2, queries, 20))
        return fold_scores(q, w, reader(key, used), put, zeros, implementation, block=8)

    want = index_scores(q, w, key, "reference")
    close(blocks(20), want, 1e-5)
    close(blocks(9), jnp.where(jnp.arange(20)[None, None] < 16, want, 0), 1e-5)


def test_the_best_slots_are_those_of_a_full_search():
    """The scores take few values, so that most tie.

    Rows see everything, less than k slots, and nothing.
    """
    rng = np.random.default_rng(0)
    key_BCJ, q_BTIJ = (
        jnp.asarray(rng.integers(-1, 2, shape), jnp.float32) for shape in ((2, 64, 3), (2, 3, 2, 3))
    )
    w_BTI, position_BT = jnp.ones((2, 3, 2)), jnp.asarray([[255, 13, 2], [160, 27, 99]], jnp.int32)
    whole = index_scores(q_BTIJ, w_BTI, key_BCJ, "reference")
    whole = jnp.where(jnp.arange(64)[None, None] * 4 + 3 <= position_BT[..., None], whole, -jnp.inf)
    expected, expected_slot = jax.lax.top_k(whole, 5)
    seen = np.isfinite(expected)
    assert seen.sum(-1).tolist() == [[5, 3, 0], [5, 5, 5]]
    for kernels in (Kernels(), Kernels(top_k="groups", index_scores="by_head")):
        # Two blocks that overlap.
        score_BTK, slot_BTK = jax.jit(
            lambda kernels=kernels: best_slots(
                q_BTIJ, w_BTI, reader(key_BCJ, 64), position_BT, 4, 5, kernels, block=48, group=4
            )
        )()
        order = np.argsort(-np.asarray(score_BTK), axis=-1, kind="stable")
        slot_BTK = np.take_along_axis(np.asarray(slot_BTK), order, -1)
        np.testing.assert_array_equal(
            np.take_along_axis(np.asarray(score_BTK), order, -1), expected
        )
        np.testing.assert_array_equal(slot_BTK[seen], np.asarray(expected_slot)[seen])


def test_only_long_caches_are_searched():
    short, long = (reader(jnp.zeros((1, slots, 1)), slots) for slots in (2048, 8192))
    assert may_search(long, 64) and may_search(long, 64, Kernels(top_k="groups"))
    assert not may_search(short, 8) and not may_search(long, 65)
    assert not may_search(jnp.zeros((1, 8192, 1)), 64)
    for kernels in (Kernels(top_k="bisection"), Kernels(index_scores="reference")):
        assert not may_search(long, 64, kernels)
