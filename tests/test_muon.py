"""Muon is Algorithm 1, for every matrix that the checkpoint stores as one; the rest is AdamW.

The schedule is the report's.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import muon as reference
from trees import random_params, small_config

from v4jax.checkpoint.names import official_names
from v4jax.model.router import Routing
from v4jax.train.balance import update_bias
from v4jax.train.muon import clip_apart, newton_schulz, optimizer, optimizer_of
from v4jax.train.schedule import learning_rate

SHAPES = {"square": (24, 24), "tall": (40, 16), "wide": (16, 40), "experts": (2, 3, 24, 16)}


def test_several_steps_equal_the_plain_restatement():
    rng = np.random.default_rng(0)
    params = {
        name: {"wq_a": rng.normal(size=shape).astype(np.float32)} for name, shape in SHAPES.items()
    }
    params["a"] = {"attn_sink": rng.normal(size=7).astype(np.float32)}
    tx = optimizer(lambda step: 0.01)
    state = tx.init(params)
    update = jax.jit(tx.update)
    got = params
    expected = {
        name: value["wq_a"].astype(np.float64) for name, value in params.items() if name != "a"
    }
    momentum = {name: np.zeros_like(value) for name, value in expected.items()}
    vector, m, v = params["a"]["attn_sink"].astype(np.float64), np.zeros(7), np.zeros(7)
    for step in range(1, 6):
        grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
        updates, state = update(grads, state, got)
        got = jax.tree.map(jnp.add, got, updates)
        for name, w in expected.items():
            g = grads[name]["wq_a"].astype(np.float64)
            for index in np.ndindex(w.shape[:-2]):
                w[index], momentum[name][index] = reference.muon(
                    w[index], momentum[name][index], g[index], lr=0.01
                )
        vector, m, v = reference.adamw(
            vector, m, v, grads["a"]["attn_sink"].astype(np.float64), step, lr=0.01
        )
    for name, w in expected.items():
        np.testing.assert_allclose(got[name]["wq_a"], w, atol=1e-6)
    np.testing.assert_allclose(got["a"]["attn_sink"], vector, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values())
def test_singular_values_become_one_and_updates_have_rms_018(shape):
    g = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    x = np.asarray(jax.jit(newton_schulz)(g))
    np.testing.assert_allclose(np.linalg.svd(x, compute_uv=False), 1, atol=0.02)
    scaled = x * max(shape[-2:]) ** 0.5 * 0.18
    assert np.sqrt(np.mean(scaled**2)) == pytest.approx(0.18, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES.values())
def test_a_step_moves_a_matrix_by_018_times_the_learning_rate(shape):
    """Root mean square of the whole update, with momentum and learning rate.

    Weight decay is off, since it adds its own.
    """
    params = {"wq_a": jnp.zeros(shape)}
    tx = optimizer(lambda step: 0.01, weight_decay=0.0)
    state = tx.init(params)
    for seed in range(2):
        updates, state = tx.update(
            {"wq_a": jax.random.normal(jax.random.key(seed), shape)}, state, params
        )
        for matrix in np.asarray(updates["wq_a"]).reshape(-1, *shape[-2:]):
            assert np.sqrt(np.mean(matrix**2)) == pytest.approx(0.18 * 0.01, rel=0.01)


def test_no_gradient_gives_no_update():
    assert not np.asarray(newton_schulz(jnp.zeros((4, 6)))).any()


def test_every_parameter_gets_the_optimizer_of_its_official_tensor():
    cfg = small_config()
    for name, slot in official_names(cfg).items():
        if slot.path[0] == "router":
            continue
        expected, index = reference.optimizer_of(name), ".indexer." in name
        assert optimizer_of(slot.path) == ("frozen" if index else expected), name
        assert optimizer_of(slot.path, trains_index=True) == (
            f"index_{expected}" if index else expected
        ), name


def test_clipping_the_indexer_leaves_the_main_model_alone():
    grads = {"a": {"wq_a": jnp.full((2, 2), 3.0)}, "indexer": {"wq_b": jnp.full((2, 2), 0.1)}}
    small, large = (grads | {"indexer": {"wq_b": jnp.full((2, 2), x)}} for x in (0.1, 1e6))
    clip = clip_apart(2.0)
    for given, index in ((small, 0.1), (large, 1.0)):
        clipped, _ = clip.update(given, clip.init(given))
        np.testing.assert_allclose(clipped["a"]["wq_a"], 1.0, rtol=1e-6)
        np.testing.assert_allclose(clipped["indexer"]["wq_b"], index, rtol=1e-6)
    plain, _ = clip.update({"a": grads["a"]}, clip.init(grads))  # a model without an indexer
    np.testing.assert_allclose(plain["a"]["wq_a"], 1.0, rtol=1e-6)


def test_schedule_warms_up_stays_and_falls_to_a_tenth():
    rate = learning_rate(2.0, steps=100, warmup_steps=10, decay_steps=20, final_ratio=0.1)
    assert float(rate(0)) == pytest.approx(0.2)
    assert [float(rate(step)) for step in (9, 10, 50, 80)] == pytest.approx([2.0] * 4)
    assert float(rate(90)) == pytest.approx(1.1)
    assert float(rate(100)) == pytest.approx(0.2)


def test_bias_moves_towards_the_mean_load():
    router = random_params(small_config(num_hash_layers=0))["router"]
    load = np.array([5.0, 1, 3, 3, 2, 4])
    routing = {
        group: {
            name: Routing(np.broadcast_to(load, np.shape(state["ffn"]["bias"])), 0.0)
            for name, state in blocks.items()
        }
        for group, blocks in router.items()
    }
    new = update_bias(router, routing, 0.001)
    moved = np.array([-0.001, 0.001, 0, 0, 0.001, -0.001])
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(new), jax.tree.leaves(router), strict=True
    ):
        expected = b + (moved if path[-1].key == "bias" else 0)
        np.testing.assert_allclose(a, expected, atol=1e-6)
