"""Each implementation of the attention has values and gradients of one softmax over all keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import attention as equation
from trees import close

from v4jax.kernels.attention import (
    IMPLEMENTATIONS,
    EntryKeys,
    WindowKeys,
    attention,
    chunks_of,
    entry_mass,
    gathers,
)

each = pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
BLOCKS, BLOCK, HEADS, DIM = 2, 3, 4, 8
ROWS = BLOCKS * BLOCK


def inputs(batch, gathered):
    """(queries, window, entries, sinks); one query of each row sees no entry."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    shape = (2, ROWS, 7, DIM) if gathered else (2, 7, DIM)
    # A query sees itself, whichever block it lies in.
    near = np.array(rng.random((batch, BLOCKS, BLOCK, 2 * BLOCK)) < 0.6)
    near[..., np.arange(BLOCK), BLOCK + np.arange(BLOCK)] = True
    far = np.array(rng.random((batch, ROWS, 7)) < 0.5)
    far[:, 1] = False
    window = WindowKeys(normal(2, BLOCKS, 2 * BLOCK, DIM), jnp.asarray(near))
    entries = EntryKeys(normal(*shape), jnp.asarray(far))
    return normal(2, ROWS, HEADS, DIM), window, entries, normal(HEADS)


@pytest.mark.parametrize("batch", [1, 2])  # one mask for all rows, or each its own
@pytest.mark.parametrize("gathered", [False, True])
@each
def test_attention_has_values_and_gradients_of_one_softmax(implementation, gathered, batch):
    q, window, entries, sink = inputs(batch, gathered)

    def of(name):
        def run(q, near, far, sink):
            keys = window._replace(key_BUYH=near), entries._replace(key=far)
            return attention(q, *keys, sink, name)

        return jax.vjp(run, q, window.key_BUYH, entries.key, sink)

    (got, pull), (want, want_pull) = of(implementation), of("reference")
    ct = jax.tree.map(jnp.cos, want)
    # Sums over 13 keys and their scores, in another order.
    close((got, pull(ct)), (want, want_pull(ct)), 5e-6)
    for b in range(2):
        for t in range(ROWS):
            u, w = divmod(t, BLOCK)
            near = window.key_BUYH[b, u][window.mask_BUWY[b % batch, u, w]]
            far = entries.key[b, t] if gathered else entries.key[b]
            keys = np.concatenate((near, far[entries.mask_BTC[b % batch, t]])).astype(np.float64)
            close(got[0][b, t], equation.attend(np.asarray(q[b, t]), keys, np.asarray(sink)), 5e-6)


@pytest.mark.parametrize("gathered", [False, True])
@each
def test_parts_are_merged_by_the_denominator(implementation, gathered):
    """Window and sink apart from entries; a query that sees no entry gets nothing from them."""
    q, window, entries, sink = inputs(2, gathered)
    out, lse = attention(q, window, entries, sink, implementation)
    near, near_lse = attention(q, window, None, sink, implementation)
    far, far_lse = attention(q, None, entries, None, implementation)
    assert not np.asarray(far[:, 1]).any() and (np.asarray(far_lse[:, 1]) == -np.inf).all()
    close(jnp.logaddexp(near_lse, far_lse), lse)
    share = jnp.exp(far_lse - lse)[..., None]
    close(near * (1 - share) + far * share, out)
    alone, alone_lse = attention(q, window, None, None, implementation)
    close(jnp.exp(alone_lse - near_lse)[..., None] * alone, near)


@pytest.mark.parametrize("gathered", [False, True])
def test_the_mass_of_entries_is_what_the_softmax_gives_them(gathered):
    """Keys that are unit vectors, beside a window of zeros, make an output of shares."""
    q, window, entries, sink = inputs(2, gathered)
    entries = entries._replace(key=jnp.broadcast_to(jnp.eye(7, DIM), entries.key.shape))
    window = window._replace(key_BUYH=jnp.zeros_like(window.key_BUYH))
    out, lse = attention(q, window, entries, sink)
    mass = entry_mass(q, entries, lse)
    close(mass, out[..., :7].sum(2))
    assert not np.asarray(mass[:, 1]).any()
    slopes = jax.grad(lambda q, lse: entry_mass(q, entries, lse).sum(), (0, 1))(q, lse)
    assert not any(np.asarray(slope).any() for slope in slopes)


def test_chunks_hold_whole_blocks_of_few_enough_scores():
    assert chunks_of(1, 100, 8, 10) == (13, 1)
    blocks, chunks = chunks_of(2, 4096, 128, 2048)
    assert chunks > 1 and 4 * 2 * blocks * 128 * 2048 <= 2**24
    assert chunks * blocks * 128 >= 4096 > (chunks - 1) * blocks * 128
    assert chunks_of(64, 256, 128, 2**20) == (1, 2)  # a block is never cut


def test_few_queries_gather_sooner():
    assert gathers(8, 1, 8) and not gathers(7, 1, 8)
    assert gathers(64, 100, 8) and not gathers(63, 100, 8)
