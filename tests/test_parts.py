"""Parts of the model against plain restatements: values and gradients, at their extremes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import close

from sharding.audit import collectives
from sharding.embedding import embed_lookup
from sharding.experts import Groups
from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import AxisRules, layout_for
from v4jax.initializers import balanced_table
from v4jax.kernels import expert_ffn as ffn
from v4jax.kernels import expert_ffn_gpu
from v4jax.kernels.expert_ffn import (
    FEW_ROWS,
    Activation,
    ExpertWeights,
    clamped_swiglu,
    every_expert,
    expert_ffn,
    pays_every_expert,
)
from v4jax.model.hyper import balanced
from v4jax.model.router import router_scores

LIMIT = 2.0


@pytest.mark.parametrize("sizes", [(0, 0, 32, 0), (8, 8, 8, 8), (24, 0, 0, 8)])
def test_grouped_experts_are_a_loop_over_rows(sizes):
    """The block loop and the products of TPU and NVIDIA agree, however uneven the load.

    Some rows have weight 0, and some blocks are not in use.
    """
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def normal(*shape):
        return jax.random.normal(next(keys), shape)

    rows, block = 40, 8
    w = ExpertWeights(normal(4, 6, 5), normal(4, 6, 5), normal(4, 5, 6))
    x, ct, gate = normal(rows, 6), normal(rows, 6), normal(rows)
    expert = np.repeat(np.arange(4), sizes)
    used = (np.arange(rows) < len(expert)) & (np.arange(rows) % 5 > 0)
    gate = jnp.where(used, gate, 0)
    by_block = np.concatenate((expert[::block], np.full(rows // block, 3)))[: rows // block]
    groups = Groups(
        jnp.array(sizes, jnp.int32),
        jnp.array(by_block, jnp.int32),
        jnp.array(sum(sizes) // block, jnp.int32),
    )

    def plain(w, x, gate):
        out = []
        for i in range(rows):
            own = ExpertWeights(*(m[by_block[i // block]] for m in w))
            out.append((clamped_swiglu(x[i] @ own.w1, x[i] @ own.w3, LIMIT) * gate[i]) @ own.w2)
        return jnp.stack(out)

    value, pull = jax.vjp(plain, w, x, gate)
    ct = jnp.where(used[:, None], ct, 0)
    want = pull(ct)
    got_value, got_pull = jax.vjp(
        lambda w, x, gate: expert_ffn(Activation(LIMIT), w, x, gate, groups), w, x, gate
    )
    close(jnp.where(used[:, None], got_value, 0), value)
    got = got_pull(ct)
    close(
        (got[0], got[1] * used[:, None], got[2] * used),
        (want[0], want[1] * used[:, None], want[2] * used),
    )
    tpu = ffn._ragged_dot, functools.partial(ffn.grouped_outer, interpret=True)
    for products in (
        tpu,
        [
            functools.partial(f, interpret=True)
            for f in (expert_ffn_gpu.grouped_dot, expert_ffn_gpu.grouped_outer)
        ],
    ):
        y, h1, h3 = ffn._whole_forward(Activation(LIMIT), *products, w, x, gate, groups)
        got = ffn._whole_backward(Activation(LIMIT), *products, w, x, gate, groups, h1, h3, ct)
        close(jnp.where(used[:, None], y, 0), value)
        close(
            (got[0], got[1] * used[:, None], got[2] * used),
            (want[0], want[1] * used[:, None], want[2] * used),
        )


@pytest.mark.parametrize("mesh", ["context=4,expert=2", "data=2,context=2,tensor=2"])
def test_mixing_matrices_are_balanced_where_their_tokens_lie(mesh):
    """Values and gradient are those of one device; nothing is sent. Rows and sequence are cut."""
    sizes = parse_mesh(mesh)
    rules, mesh = layout_for("full", sizes), make_mesh(sizes)
    logits, ct = (
        jax.random.normal(jax.random.key(0), (4, 12, 16)),
        jax.random.normal(jax.random.key(1), (4, 12, 4, 4)),
    )

    def both(rules, logits, ct):
        value, pull = jax.vjp(functools.partial(balanced, rules, 20, 1e-6), logits)
        return value, pull(ct)

    with jax.set_mesh(mesh):
        place = jax.NamedSharding(mesh, rules.spec(("act_batch", "act_seq")))
        cut = jax.device_put((logits, ct), place)
        program = jax.jit(functools.partial(both, rules)).lower(*cut).compile()
        close(program(*cut), both(AxisRules(), logits, ct))
    assert not collectives(program.as_text(), mesh)


def test_router_gradient_is_finite_at_any_logit():
    logits = jnp.array([-1e4, -200.0, -30.0, -20.0, -19.9, 0.0, 30.0, 200.0, 1e4])
    score, slope = jax.vmap(
        jax.value_and_grad(lambda z: router_scores(z[None, None, None], jnp.ones((1, 1)))[0, 0, 0])
    )(logits)
    assert jnp.isfinite(score).all() and jnp.isfinite(slope).all()
    middle = slice(2, -1)
    want = np.sqrt(np.logaddexp(0, np.asarray(logits[middle], np.float64)))
    np.testing.assert_allclose(score[middle], want, rtol=1e-5)


@pytest.mark.parametrize("experts", [3, 4])  # w2 takes two at a time if they are even
def test_all_experts_on_a_few_rows_are_each_row_s_own_experts(experts):
    """Batches of products agree with a loop over rows and their experts.

    5e-6: they add 20 numbers in another order.
    """
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    w1, w3, w2 = normal(experts, 6, 5), normal(experts, 6, 5), normal(experts, 5, 6)
    x, gate = normal(8, 6), jnp.asarray(rng.random((8, 2)), jnp.float32).at[3, 1].set(0)
    index = jnp.asarray([rng.permutation(experts)[:2] for _ in range(8)])
    joined = ExpertWeights(jnp.concatenate((w1, w3), axis=-1), None, w2)
    got = every_expert(Activation(LIMIT), joined, x, index, gate)
    for t in range(8):
        parts = [
            (clamped_swiglu(x[t] @ w1[e], x[t] @ w3[e], LIMIT) * g) @ w2[e]
            for e, g in zip(index[t], gate[t], strict=True)
        ]
        np.testing.assert_allclose(got[t], sum(parts), rtol=5e-6, atol=5e-6)
    assert pays_every_expert(joined, 2, 2) and not pays_every_expert(
        joined, 1, 2
    )  # one row leaves experts out
    assert not pays_every_expert(joined, FEW_ROWS + 1, 2) and not pays_every_expert(
        joined._replace(w3=w3), 8, 2
    )


def test_balanced_table_gives_every_expert_its_share():
    table = np.asarray(balanced_table(jax.random.key(3), 64, 16, 4)).astype(int)
    assert table.shape == (64, 4) and all(len(set(row)) == 4 for row in table)
    np.testing.assert_array_equal(np.bincount(table.ravel(), minlength=16), 16)


@pytest.mark.parametrize(
    "mesh", ["fsdp=2,expert=2,tensor=2", "fsdp=2,context=2,tensor=2", "context=4,expert=2"]
)
@pytest.mark.parametrize("layout", ["full", "pod"])
def test_embedding_lookup_never_gathers_the_table(mesh, layout, capfd):
    sizes = parse_mesh(mesh)
    rules, device_mesh = layout_for(layout, sizes), make_mesh(sizes)
    table = jax.random.normal(jax.random.key(0), (32, 16))
    tokens = jax.random.randint(jax.random.key(1), (8, 12), 0, 32)
    ct = jax.random.normal(jax.random.key(2), (8, 12, 16))
    want, pull = jax.vjp(lambda table: table[tokens], table)
    with jax.set_mesh(device_mesh):
        place = jax.NamedSharding(device_mesh, rules.spec(("vocab", "embed")))

        def both(table, ct):
            value, pull = jax.vjp(lambda table: embed_lookup(rules, table, tokens), table)
            return value, pull(ct)[0]

        everywhere = jax.NamedSharding(device_mesh, jax.P())
        step = jax.jit(both, in_shardings=(place, everywhere)).lower(table, ct).compile()
        got, gradient = step(jax.device_put(table, place), jax.device_put(ct, everywhere))
    np.testing.assert_array_equal(got, want)
    close(gradient, pull(ct)[0])
    # The table is not gathered whole; nor does XLA say, as it does on stderr, that it copies what
    # it cannot partition.
    assert not [
        one
        for one in collectives(step.as_text(), device_mesh)
        if one.kind == "all-gather" and math.prod(one.shape) >= table.size
    ]
    assert "rematerialization" not in capfd.readouterr().err
