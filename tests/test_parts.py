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
from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import AxisRules, layout_for
from v4jax.initializers import balanced_table
from v4jax.model.hyper import balanced
from v4jax.model.router import router_scores


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
