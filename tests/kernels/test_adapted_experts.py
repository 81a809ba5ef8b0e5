"""Experts with constant matrices and low-rank pairs: values and gradients of merged matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import close

from sharding.experts import Groups
from v4jax.kernels.expert_ffn.adapted import IMPLEMENTATIONS, ExpertPairs, Pair, adapted_ffn
from v4jax.kernels.expert_ffn.every_expert import reference
from v4jax.kernels.expert_ffn.formulas import Activation, ExpertWeights
from v4jax.quant.packed import Packed

FORM = Activation(2.0)


def case(implementation, sizes, block=8, adapters=()):
    """(matrices, pairs, rows, gates, groups) with rows of weight 0 and blocks not in use."""
    block, width, hidden = {"triton": (16, 16, 32), "ragged": (16, 256, 128)}.get(
        implementation, (block, 6, 5)
    )
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    def pair(rows, columns):
        return Pair(0.3 * normal(4, rows, *adapters, 3), 0.3 * normal(4, *adapters, 3, columns))

    w = ExpertWeights(normal(4, width, hidden), normal(4, width, hidden), normal(4, hidden, width))
    pairs = ExpertPairs(pair(width, hidden), None, pair(hidden, width))
    rows, by_block = 8 * block, np.repeat(np.arange(4), sizes)
    used = (np.arange(rows) < len(by_block) * block) & (np.arange(rows) % 5 > 0)
    groups = Groups(
        jnp.array(sizes, jnp.int32) * block,
        jnp.array(np.append(by_block, np.full(8 - len(by_block), 3)), jnp.int32),
        jnp.array(sum(sizes), jnp.int32),
    )
    return w, pairs, normal(rows, width), jnp.where(used, normal(rows), 0), groups


def merged(w: ExpertWeights, pairs: ExpertPairs) -> ExpertWeights:
    def one(m, pair):
        return m if pair is None else m + pair.a @ pair.b

    return ExpertWeights(*(one(m, pair) for m, pair in zip(w, pairs, strict=True)))


@pytest.mark.parametrize("sizes", [(0, 0, 4, 0), (1, 2, 0, 3)])  # in blocks
@pytest.mark.parametrize("implementation", [None, *(n for n in IMPLEMENTATIONS if n != "best")])
def test_pairs_are_merged_matrices(implementation, sizes):
    w, pairs, x, gate, groups = case(implementation, sizes)
    ct, used = jnp.cos(x), (gate != 0)[:, None]

    def results(function):
        value, pull = jax.vjp(function, pairs, x, gate)
        ct_pairs, ct_x, ct_gate = pull(ct)
        masked = [jnp.where(used, a, 0) for a in (value, ct_x, ct_gate[:, None])]
        return [*masked, ct_pairs]

    want = results(lambda p, *rows: reference(FORM, merged(w, p), *rows, groups))
    got = results(lambda p, *rows: adapted_ffn(FORM, w, p, *rows, groups, implementation))
    close(got, want, 5e-6)


def test_a_few_rows_with_a_pair_beside_each_are_merged_matrices():
    """Values and gradients; blocks of one row, as one token has them."""
    w, pairs, x, gate, groups = case(None, (1, 0, 2, 1), block=1)
    ct = jnp.cos(x)

    def results(function):
        value, pull = jax.vjp(function, pairs, x, gate)
        return value, pull(ct)

    want = results(jax.jit(lambda p, *rows: reference(FORM, merged(w, p), *rows, groups)))
    close(results(jax.jit(lambda p, *rows: adapted_ffn(FORM, w, p, *rows, groups))), want, 5e-6)


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("adapters", [2, 4])  # the pairs lie beside blocks, beside rows
def test_each_row_has_the_pair_of_its_own_adapter(adapters, implementation):
    """A row whose number is -1 has none."""
    w, pairs, x, gate, groups = case(None, (1, 2, 0, 1), adapters=(adapters,))
    number = jnp.asarray(np.random.default_rng(1).integers(-1, adapters, len(x)))
    got = adapted_ffn(FORM, w, pairs, x, gate, groups, implementation, number)
    plain = jax.jit(functools.partial(reference, FORM))
    for n in range(-1, adapters):
        mine = ExpertPairs(*(p and Pair(p.a[:, :, n], p.b[:, n]) for p in pairs))
        want = plain(w if n < 0 else merged(w, mine), x, gate, groups)
        rows = np.asarray((number == n) & (gate != 0))
        assert rows.sum() > 2
        close(got[rows], want[rows], 5e-6)


def test_rows_of_weight_0_may_hold_anything():
    """Neither they nor what flows back to them reaches a pair's gradient."""
    w, pairs, x, gate, groups = case(None, (1, 2, 0, 3))
    unused, ct = (gate == 0)[:, None], jnp.cos(x)

    def ct_pairs(x, ct):
        return jax.vjp(lambda p: adapted_ffn(FORM, w, p, x, gate, groups), pairs)[1](ct)[0]

    spoilt = ct_pairs(jnp.where(unused, jnp.nan, x), jnp.where(unused, jnp.nan, ct))
    close(spoilt, ct_pairs(x, ct), 0)


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_packed_matrices_are_their_numbers(implementation):
    """Values and gradients are the same bits: a packed matrix is read where it multiplies."""
    _, _, _, gate, groups = case(None, (1, 2, 0, 3))
    rng, side = np.random.default_rng(1), 32

    def packed():
        codes = rng.integers(0, 256, (4, side // 2, side), np.uint8)
        return Packed(jnp.asarray(codes), jnp.full((4, 1, side), 125, jnp.uint8), "mxfp4")

    def normal(*shape):
        return jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32)

    w = ExpertWeights(packed(), packed(), packed())
    numbers = ExpertWeights(*(m.numbers(jnp.float32) for m in w))
    assert all(np.abs(np.asarray(m)).max() == 1.5 for m in numbers)  # 6 times 2^(125 - 127)
    pairs = ExpertPairs(*(Pair(normal(4, side, 3), normal(4, 3, side)) for _ in w))
    x = normal(len(gate), side)

    @functools.partial(jax.jit, static_argnums=0)
    def results(implementation, w, pairs, x, gate):
        def run(*inputs):
            return adapted_ffn(FORM, w, *inputs, groups, implementation)

        value, pull = jax.vjp(run, pairs, x, gate)
        return value, pull(jnp.cos(x))

    rows = (pairs, x, gate)
    close(results(implementation, w, *rows), results(implementation, numbers, *rows), 0)


def test_kernels_refuse_widths_that_they_cannot_cut():
    w, pairs, x, gate, groups = case(None, (1, 2, 0, 3))
    with pytest.raises(ValueError, match="expert_ffn: got 'triton' for widths 6 and 5 and 8"):
        adapted_ffn(FORM, w, pairs, x, gate, groups, "triton")
