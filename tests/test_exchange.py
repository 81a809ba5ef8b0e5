"""Experts that exchange routed tokens give the numbers of one device, however uneven the load."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import exchange as exchanges
from sharding import experts
from sharding.counting import ranks, running_sum
from sharding.exchange import (
    Window,
    exchange,
    expert_of_rows,
    round_rows,
    rounds_needed,
    route,
    window,
)
from sharding.experts import apply_experts
from sharding.manual import vary_like
from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import AxisRules, layout_for
from v4jax.kernels.expert_ffn.formulas import Activation, ExpertWeights
from v4jax.kernels.expert_ffn.op import expert_ffn

E, K, D, F, BATCH, SEQ = 8, 3, 8, 16, 8, 6
INTO, OUT = (
    ("experts", "expert_embed", "expert_hidden"),
    ("experts", "expert_hidden", "expert_embed"),
)
AXES = {"w1": INTO, "w3": INTO, "w2": OUT}


def expert(weights, x_PD, gate_P, groups):
    return expert_ffn(Activation(7.0), ExpertWeights(**weights), x_PD, gate_P, groups)


def apply(rules, weights, x, index, gate):
    return apply_experts(rules, expert, weights, AXES, x, index, gate)


def routed(load: str) -> np.ndarray:
    rng = np.random.default_rng(1)
    if (
        load == "one expert"
    ):  # every device's rows want the same device: as many rounds as there can be
        return np.full((BATCH, SEQ, K), 5, np.int32)
    if load == "one device":
        return rng.integers(2, 4, (BATCH, SEQ, K)).astype(np.int32)
    return (
        np.stack([rng.permutation(E)[:K] for _ in range(BATCH * SEQ)])
        .reshape(BATCH, SEQ, K)
        .astype(np.int32)
    )


@pytest.mark.parametrize(
    "mesh", ["expert=8", "fsdp=2,expert=4", "expert=2,tensor=2,data=2", "context=2,expert=4"]
)
def test_exchange_equals_one_device_at_any_load(mesh):
    compare(mesh, ("even", "one device", "one expert"))


@pytest.mark.parametrize("mesh", ["expert=8", "fsdp=2,expert=4"])
def test_rows_that_nothing_landed_in_are_never_read(mesh, monkeypatch):
    """On TPUs and GPUs they hold what was in memory, in the gradient's exchange too."""
    by_gather = exchanges._exchange_by_gather
    monkeypatch.setattr(exchanges, "NOT_LANDED", np.nan)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1, 3))
    def exchange(x_AD, rows, moves, holders):
        return by_gather(x_AD, Window(*(vary_like(a, x_AD) for a in moves)), rows, holders)

    def back(rows, holders, saved, ct_QD):
        given, moves = saved
        return exchange(ct_QD, given.shape[0], moves.back(), holders), None

    exchange.defvjp(
        lambda x_AD, rows, moves, holders: (exchange(x_AD, rows, moves, holders), (x_AD, moves)),
        back,
    )
    monkeypatch.setattr(experts, "exchange", exchange)
    compare(mesh, ("even", "one device"))


def compare(mesh, loads):
    """Values and gradients on the mesh beside those of one device."""
    sizes = parse_mesh(mesh)
    rules, device_mesh = layout_for("pod", sizes), make_mesh(sizes)
    assert rules.exchange
    keys = iter(jax.random.split(jax.random.key(0), 6))
    weights = {
        name: jax.random.normal(next(keys), (E, F, D) if name == "w2" else (E, D, F))
        for name in AXES
    }
    x, ct = jax.random.normal(next(keys), (2, BATCH, SEQ, D))
    gate = jax.random.uniform(next(keys), (BATCH, SEQ, K))

    def both(rules, weights, x, index, gate, ct):
        y, pull = jax.vjp(lambda w, x, gate: apply(rules, w, x, index, gate), weights, x, gate)
        return y, pull(ct)

    alone = jax.jit(functools.partial(both, AxisRules()))
    with jax.set_mesh(device_mesh):
        shared = jax.jit(functools.partial(both, rules))
        for load in loads:
            index = jnp.asarray(routed(load))
            for got, want in zip(
                jax.tree.leaves(shared(weights, x, index, gate, ct)),
                jax.tree.leaves(alone(weights, x, index, gate, ct)),
                strict=True,
            ):  # sums of up to 3 * 48 products in another order
                np.testing.assert_allclose(got, want, atol=3e-6 * float(np.abs(want).max()), rtol=0)


@pytest.mark.parametrize("layout", ["pod", "ep_fsdp"])
def test_matrices_travel_in_the_compute_dtype_and_their_gradients_in_float32(layout):
    sizes = parse_mesh("fsdp=2,expert=2")
    rules = layout_for(layout, sizes)
    weights = {name: jnp.ones((E, F, D) if name == "w2" else (E, D, F)) for name in AXES}
    x, gate = jnp.ones((BATCH, SEQ, D), jnp.bfloat16), jnp.ones((BATCH, SEQ, K))
    with jax.set_mesh(make_mesh(sizes)):

        def loss(weights):
            return apply(rules, weights, x, routed("even"), gate).astype(jnp.float32).sum()

        program = str(jax.make_jaxpr(jax.grad(loss))(weights))
    assert (
        re.findall(rf":(\w+)\[{E // 2},(?:{D},{F}|{F},{D})\]\S* = all_gather", program)
        == ["bf16"] * 3
    )
    assert (
        re.findall(
            rf":(\w+)\[{E // 2},(?:{D // 2},{F}|{F},{D // 2})\]\S* = reduce_scatter", program
        )
        == ["f32"] * 3
    )


def test_other_weights_are_held_where_they_lie_before_they_are_gathered():
    """XLA then casts the pieces, not the whole."""
    sizes = parse_mesh("fsdp=2,expert=2")
    rules, names = layout_for("pod", sizes), ("embed", "q_lora")
    with jax.set_mesh(make_mesh(sizes)):
        program = jax.make_jaxpr(lambda w: rules.gather(w.astype(jnp.bfloat16), names))(
            jnp.ones((8, 4))
        ).jaxpr
    (call,) = (eqn for eqn in program.eqns if "custom_vjp" in eqn.primitive.name)
    inner = next(value for value in call.params.values() if hasattr(value, "jaxpr")).jaxpr.eqns
    specs = [
        eqn.params["sharding"].spec for eqn in inner if eqn.primitive.name == "sharding_constraint"
    ]
    assert specs[0] == rules.spec(names) and specs[-1] == rules.whole_weights().spec(names)
    assert specs[0] != specs[-1]


def test_every_row_lands_once_and_comes_home():
    """Each row reaches its expert's device, in one round, and returns.

    Rounds of 4 rows run on 4 devices with uneven queues.
    """
    sizes = parse_mesh("expert=4")
    holders, tokens, rows = ("expert",), 5, 4
    index = (
        np.random.default_rng(0).integers(0, E, (4, tokens, K)).astype(np.int32) // 2
    )  # devices 0 and 1 only

    def local(index_sTK, turn):
        path = route(index_sTK[0], E, holders)
        names = (jax.lax.axis_index(holders) * 100 + path.assignment_A + 1).astype(jnp.float32)[
            :, None
        ]
        moves = window(path, turn, rows)
        landed = exchange(names, rows, moves, holders)
        home = exchange(landed, names.shape[0], moves.back(), holders)
        which = expert_of_rows(path, turn, rows, holders)
        count = rounds_needed(path, rows)
        return landed[None], (home / names)[None], which[None], count[None]

    spec = jax.P("expert")
    with jax.set_mesh(make_mesh(sizes)):
        run = jax.jit(jax.shard_map(local, in_specs=(spec, jax.P()), out_specs=spec))
        counts = np.bincount(index.reshape(-1) // 2, minlength=4)
        needed = int(run(index, 0)[3][0])
        assert needed == -(-counts.max() // rows)
        came_home = np.zeros((4, tokens * K, 1))
        seen = []
        for turn in range(needed):
            landed, home, which, _ = (np.asarray(a) for a in run(index, turn))
            came_home += home
            for device in range(4):
                for name, e in zip(landed[device, :, 0].astype(int), which[device], strict=True):
                    assert (name == 0) == (e == -1)
                    if name:
                        sender, assignment = divmod(name - 1, 100)
                        assert index[sender].reshape(-1)[assignment] == device * 2 + e
                        seen.append(name)
    assert len(seen) == len(set(seen)) == index.size
    np.testing.assert_array_equal(came_home, 1)


def test_rounds_have_headroom():
    assert round_rows(100) == 152
    assert round_rows(3) % 8 == 0


@pytest.mark.parametrize("n", [1, 127, 128, 300])
def test_running_sums_and_ranks_are_a_stable_sort(n):
    index = np.random.default_rng(n).integers(-1, 6, n).astype(np.int32)  # -1 and 5 are no kinds
    rank, count = ranks(jnp.asarray(index), 5)
    np.testing.assert_array_equal(
        count, np.bincount(index[(index >= 0) & (index < 5)], minlength=5)
    )
    for i, kind in enumerate(index):
        assert rank[i] == (np.sum(index[:i] == kind) if 0 <= kind < 5 else 0)
    values = np.random.default_rng(0).integers(0, 1000, (2, n, 3))
    np.testing.assert_array_equal(running_sum(jnp.asarray(values)), np.cumsum(values, axis=1))
