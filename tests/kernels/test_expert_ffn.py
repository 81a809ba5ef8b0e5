"""Each implementation of the experts has values and gradients of a loop over rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import moe
from trees import close, small_config

from sharding.experts import Groups
from v4jax.kernels.expert_ffn import rows_tpu
from v4jax.kernels.expert_ffn.every_expert import FEW_ROWS, every_expert, pays_every_expert
from v4jax.kernels.expert_ffn.formulas import Activation, ExpertWeights, clamped_swiglu
from v4jax.kernels.expert_ffn.op import IMPLEMENTATIONS, expert_ffn

LIMIT = 2.0


def plain(w, x, gate, by_block, block):
    """One row after another."""
    out = []
    for i in range(len(x)):
        own = ExpertWeights(*(m[by_block[i // block]] for m in w))
        out.append((clamped_swiglu(x[i] @ own.w1, x[i] @ own.w3, LIMIT) * gate[i]) @ own.w2)
    return jnp.stack(out)


@pytest.mark.parametrize("sizes", [(0, 0, 4, 0), (1, 1, 1, 1), (3, 0, 0, 1)])  # in blocks
@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_grouped_experts_are_a_loop_over_rows(implementation, sizes):
    """All agree, however uneven the load; kernels of other platforms are interpreted.

    Some rows have weight 0, and some blocks are not in use.
    """
    block, width, hidden = {"triton": (16, 16, 32), "ragged": (16, 256, 128)}.get(
        implementation, (8, 6, 5)
    )
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    rows = 5 * block
    w = ExpertWeights(normal(4, width, hidden), normal(4, width, hidden), normal(4, hidden, width))
    x, ct, gate = normal(rows, width), normal(rows, width), normal(rows)
    expert = np.repeat(np.arange(4), sizes)
    used = (np.arange(rows) < len(expert) * block) & (np.arange(rows) % 5 > 0)
    gate = jnp.where(used, gate, 0)
    by_block = np.append(expert, np.full(5 - len(expert), 3))
    groups = Groups(
        jnp.array(sizes, jnp.int32) * block,
        jnp.array(by_block, jnp.int32),
        jnp.array(sum(sizes), jnp.int32),
    )

    def of_used(value, ct_w, ct_x, ct_gate):
        one = used[:, None]
        return jnp.where(one, value, 0), ct_w, jnp.where(one, ct_x, 0), jnp.where(used, ct_gate, 0)

    want, want_pull = jax.vjp(lambda *args: plain(*args, by_block, block), w, x, gate)
    got, pull = jax.vjp(
        lambda *args: expert_ffn(Activation(LIMIT), *args, groups, implementation), w, x, gate
    )
    # Sums of 32 products in another order, for the kernel of wide tiles.
    close(of_used(got, *pull(ct)), of_used(want, *want_pull(ct)), 5e-6)


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "fits"),
    [
        (128, 7168, jnp.bfloat16, True),
        (128, 7168, jnp.float32, True),
        (128, 16_384, jnp.float32, False),  # beyond a core's fast memory
        (8, 256, jnp.bfloat16, False),  # a few rows of decoding
        (128, 200, jnp.bfloat16, False),
    ],
)
def test_what_the_kernel_of_rows_takes(rows, width, dtype, fits):
    """XLA's own product computes the rest."""
    groups = Groups(jnp.array([rows]), jnp.array([0], jnp.int32), jnp.int32(1))
    x = jax.ShapeDtypeStruct((rows, width), dtype)
    assert rows_tpu.suits(((x, jax.ShapeDtypeStruct((1, width, 128), dtype)),), groups) == fits


def test_a_loop_over_rows_is_the_equation():
    """So one expert's rows are what the NumPy reference computes."""
    rng, cfg = np.random.default_rng(0), small_config(swiglu_limit=LIMIT)
    x, shapes = rng.standard_normal((7, 6)), {"w1": (5, 6), "w3": (5, 6), "w2": (6, 5)}
    official = {f"e.{name}.weight": rng.standard_normal(size) for name, size in shapes.items()}
    w = ExpertWeights(*(jnp.asarray(m.T[None], jnp.float32) for m in official.values()))
    got = plain(w, jnp.asarray(x, jnp.float32), jnp.full(7, 0.5), [0], 7)
    close(got, moe.expert(cfg, official, "e", x, 0.5))


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("experts", [3, 4])  # w2 takes two at a time if they are even
def test_all_experts_on_a_few_rows_are_each_row_s_own_experts(experts, joined):
    """Batches of products equal a loop over rows and their experts.

    5e-6: they add 20 numbers in another order.
    """
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    w1, w3, w2 = normal(experts, 6, 5), normal(experts, 6, 5), normal(experts, 5, 6)
    x, gate = normal(8, 6), jnp.asarray(rng.random((8, 2)), jnp.float32).at[3, 1].set(0)
    index = jnp.asarray([rng.permutation(experts)[:2] for _ in range(8)])
    w = ExpertWeights(w1, w3, w2)
    if joined:
        w = ExpertWeights(jnp.concatenate((w1, w3), axis=-1), None, w2)
    got = every_expert(Activation(LIMIT), w, x, index, gate)
    for t in range(8):
        parts = [
            (clamped_swiglu(x[t] @ w1[e], x[t] @ w3[e], LIMIT) * g) @ w2[e]
            for e, g in zip(index[t], gate[t], strict=True)
        ]
        np.testing.assert_allclose(got[t], sum(parts), rtol=5e-6, atol=5e-6)


def test_few_rows_that_use_most_experts_take_all():
    w = ExpertWeights(jnp.zeros((4, 6, 10)), None, jnp.zeros((4, 5, 6)))
    apart = w._replace(w3=jnp.zeros((4, 6, 5)))
    assert pays_every_expert(w, 2, 2)
    assert not pays_every_expert(w, 1, 2)  # one row leaves experts out
    assert not pays_every_expert(w, FEW_ROWS + 1, 2) and not pays_every_expert(apart, 8, 2)
    assert pays_every_expert(apart, 99, 2, "every_expert")
    assert not pays_every_expert(w, 2, 2, "blocked")


def test_kernels_refuse_widths_that_they_cannot_cut():
    w = ExpertWeights(jnp.zeros((2, 6, 16)), jnp.zeros((2, 6, 16)), jnp.zeros((2, 16, 6)))
    groups = Groups(jnp.array([32, 32]), jnp.array([0, 1]), jnp.array(2))
    with pytest.raises(ValueError, match="expert_ffn: got 'triton' for widths 6 and 16 and 32"):
        expert_ffn(Activation(LIMIT), w, jnp.zeros((64, 6)), jnp.zeros(64), groups, "triton")
