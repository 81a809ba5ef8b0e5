"""Muon is Algorithm 1, for every matrix that the checkpoint stores as one; the rest is AdamW.

The schedule is the report's.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from reference import muon as reference
from trees import random_params, small_config

from v4jax.checkpoint.names import official_names
from v4jax.model.router import Routing
from v4jax.train.balance import update_bias
from v4jax.train.muon import clip_apart, newton_schulz, optimizer, optimizer_of
from v4jax.train.schedule import learning_rate

ATTENTION = ("layers_0_1", "block_0", "attn")
SHAPES = {"square": (24, 24), "tall": (40, 16), "wide": (16, 40), "experts": (2, 3, 24, 16)}
PLACES = {
    "square": (*ATTENTION, "wq_a"),
    "tall": (*ATTENTION, "wq_b"),
    "wide": (*ATTENTION, "wkv"),
    "experts": ("layers_0_1", "block_0", "ffn", "experts", "w1"),
}
SINK = (*ATTENTION, "attn_sink")


def test_several_steps_equal_the_plain_restatement():
    rng = np.random.default_rng(0)
    flat = {path: rng.normal(size=SHAPES[name]).astype(np.float32) for name, path in PLACES.items()}
    flat[SINK] = rng.normal(size=7).astype(np.float32)
    got = unflatten_dict(flat)
    tx = optimizer(lambda step: 0.01)
    state = tx.init(got)
    update = jax.jit(tx.update)
    expected = {path: flat[path].astype(np.float64) for path in PLACES.values()}
    momentum = {path: np.zeros_like(value) for path, value in expected.items()}
    vector, m, v = flat[SINK].astype(np.float64), np.zeros(7), np.zeros(7)
    for step in range(1, 6):
        grads = {path: rng.normal(size=p.shape).astype(np.float32) for path, p in flat.items()}
        updates, state = update(unflatten_dict(grads), state, got)
        got = jax.tree.map(jnp.add, got, updates)
        for path, w in expected.items():
            g = grads[path].astype(np.float64)
            for index in np.ndindex(w.shape[:-2]):
                w[index], momentum[path][index] = reference.muon(
                    w[index], momentum[path][index], g[index], lr=0.01
                )
        vector, m, v = reference.adamw(vector, m, v, grads[SINK].astype(np.float64), step, lr=0.01)
    got = flatten_dict(got)
    for path, w in expected.items():
        np.testing.assert_allclose(got[path], w, atol=1e-6)
    np.testing.assert_allclose(got[SINK], vector, atol=1e-6)


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
    path = PLACES["square"]
    params = unflatten_dict({path: jnp.zeros(shape)})
    tx = optimizer(lambda step: 0.01, weight_decay=0.0)
    state = tx.init(params)
    for seed in range(2):
        grads = unflatten_dict({path: jax.random.normal(jax.random.key(seed), shape)})
        updates, state = tx.update(grads, state, params)
        for matrix in np.asarray(flatten_dict(updates)[path]).reshape(-1, *shape[-2:]):
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


def test_no_optimizer_moves_what_the_router_keeps():
    with pytest.raises(ValueError, match="router/mtp/block/ffn/bias: no optimizer"):
        optimizer_of(("router", "mtp", "block", "ffn", "bias"))


def test_clipping_the_indexer_leaves_the_main_model_alone():
    main = {"wq_a": jnp.full((2, 2), 3.0)}

    def grads(index):
        attention = main if index is None else main | {"indexer": {"wq_b": index}}
        return {"layers_2_4": {"block_0": {"attn": attention}}}

    clip = clip_apart(2.0)
    for size, index in ((0.1, 0.1), (1e6, 1.0)):
        given = grads(jnp.full((2, 2), size))
        clipped, _ = clip.update(given, clip.init(given))
        attention = clipped["layers_2_4"]["block_0"]["attn"]
        np.testing.assert_allclose(attention["wq_a"], 1.0, rtol=1e-6)
        np.testing.assert_allclose(attention["indexer"]["wq_b"], index, rtol=1e-6)
    given = grads(None)  # a model without an indexer
    plain, _ = clip.update(given, clip.init(given))
    np.testing.assert_allclose(plain["layers_2_4"]["block_0"]["attn"]["wq_a"], 1.0, rtol=1e-6)


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
