"""The kernel chooses what scores and lax.top_k choose, ties by slot, as a mask and as a list."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels import index_scores
from v4jax.kernels.index_choice import op

HEADS, DIM, RATIO = 4, 16, 4
CASES = {
    "a row": dict(seq=40),
    "documents": dict(seq=40, packed=True),
    "second shard": dict(seq=24, start=40),
    "rows that fill no block": dict(seq=150, start=3),
    "equal scores": dict(seq=40, start=100, ties=True),
    "fewer entries than chosen": dict(seq=8),
}


def seekers(dtype, seq, start=0, packed=False, ties=False):
    rng = np.random.default_rng(seq + start)

    def normal(*shape):
        # Few different numbers make many equal scores.
        x = rng.integers(-1, 2, shape) if ties else rng.standard_normal(shape)
        return jnp.asarray(x, dtype)

    count = (start + seq) // RATIO + 1  # the last slot is empty
    last = RATIO - 1 + RATIO * jnp.arange(count, dtype=jnp.int32)[None]
    segment_BS = segment_BC = None
    if packed:
        segment_BS = jnp.asarray(np.sort(rng.integers(1, 4, (2, seq)), axis=1), jnp.int32)
        segment_BC = jnp.take_along_axis(segment_BS, jnp.minimum(last, seq - 1), axis=1)
    return op.Seekers(
        normal(2, seq, HEADS, DIM),
        normal(2, seq, HEADS).astype(jnp.float32),
        jnp.array([start], jnp.int32),
        segment_BS,
        normal(2, count, DIM),
        last,
        segment_BC,
    )


def expected(x, count):
    """The mask of lax.top_k, of what each query sees."""
    score = index_scores.reference(x.q_BSIJ, x.w_BSI, x.key_BCJ)
    position = x.start_B[0] + jnp.arange(score.shape[1])
    seen = x.last_BC[:, None] <= position[None, :, None]
    if x.segment_BS is not None:
        seen &= x.segment_BS[:, :, None] == x.segment_BC[:, None]
    value, slot = jax.lax.top_k(jnp.where(seen, score, -jnp.inf), min(count, score.shape[2]))
    slot, value = np.asarray(slot)[..., None], np.asarray(value)[..., None]
    hit = (slot == np.arange(score.shape[2])) & (value > -np.inf)
    return hit.any(2)


@pytest.mark.parametrize("case", CASES)
def test_the_mask_is_that_of_top_k(case):
    x = seekers(jnp.float32, **CASES[case])
    np.testing.assert_array_equal(op.mask(x, 8), expected(x, 8))


@pytest.mark.parametrize("case", CASES)
def test_the_list_has_the_slots_of_the_mask(case):
    x = seekers(jnp.float32, **CASES[case])
    found, want = np.asarray(op.slot_list(x, 8)), expected(x, 8)
    assert found.shape == (*x.q_BSIJ.shape[:2], 8)
    for row, of_row in zip(found.reshape(-1, 8), want.reshape(-1, want.shape[2]), strict=True):
        assert sorted(row[row >= 0]) == np.flatnonzero(of_row).tolist()
