"""A step on 8 devices is the step on one: loss, gradients through the optimizer, router bias and loads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.weights import random_weights

from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import AxisRules, layout_for
from v4jax.checkpoint.names import from_official
from v4jax.config import ModelConfig, RopeScaling
from v4jax.train.config import TrainConfig
from v4jax.train.loss import loss_and_routing
from v4jax.train.muon import optimizer_of
from v4jax.train.step import TrainState, batch_sharding, compile_step, state_from, state_shardings

MODEL = ModelConfig(
    vocab_size=96, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=5, num_attention_heads=4, head_dim=16,
    qk_rope_head_dim=8, q_lora_rank=16, o_groups=2, o_lora_rank=16, n_routed_experts=8, num_experts_per_tok=2,
    routed_scaling_factor=1.5, compress_ratios=(0, 4, 128, 4, 4, 0), num_hash_layers=1, sliding_window=8, index_n_heads=8,
    index_head_dim=16, index_topk=4, compress_rope_theta=160000.0, rope_scaling=RopeScaling(),
)  # fmt: skip
CFG = TrainConfig(
    model=MODEL, run_dir="unused", steps=4, batch_size=8, seq_len=136, learning_rate=1e-3, warmup_steps=0, remat=True,
    clip_norm=1e9,
)  # fmt: skip


def batch_of():
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 3, (8, 136)), axis=1)[:, ::-1]
    return {"tokens": rng.integers(0, 96, (8, 136)).astype(np.int32), "segment_ids": segments.astype(np.int32)}


def run(mesh: str):
    """(state after a step, gradients, metrics, compiled text) on `mesh`."""
    sizes = parse_mesh(mesh)
    rules = layout_for("full", sizes) if mesh else AxisRules()
    device_mesh = make_mesh(sizes)
    with jax.set_mesh(device_mesh):
        places = state_shardings(CFG, rules, device_mesh)
        # Weights of trained scale: AdamW's eps of 1e-20 would turn gradients that are rounding noise into full steps.
        params = jax.tree.map(jnp.asarray, from_official(MODEL, random_weights(MODEL, 0)))
        state: TrainState = jax.device_put(state_from(CFG, params), places)
        batch = jax.device_put(batch_of(), batch_sharding(rules, device_mesh))
        grad = jax.jit(
            lambda p, r, b: jax.grad(lambda p: loss_and_routing(MODEL, dict(p) | {"router": r}, b, rules=rules)[0])(p),
            out_shardings=places.params,
        )
        grads = jax.tree.map(np.asarray, grad(state.params, state.router, batch))
        step = compile_step(CFG, rules, places, device_mesh).lower(state, batch).compile()
        state, metrics = step(state, batch)
    return jax.tree.map(np.asarray, state), grads, {k: float(v) for k, v in metrics.items()}, step.as_text()


@pytest.fixture(scope="module")
def one_device():
    return run("")


@pytest.mark.parametrize(
    "mesh",
    [
        "data=2,expert=2,tensor=2",
        pytest.param("fsdp=8", marks=pytest.mark.slow),
        pytest.param("expert=8", marks=pytest.mark.slow),
        pytest.param("expert=4,tensor=2", marks=pytest.mark.slow),
        pytest.param("data=8", marks=pytest.mark.slow),
        pytest.param("data=2,tensor=4", marks=pytest.mark.slow),
        pytest.param("data=2,fsdp=2,expert=2", marks=pytest.mark.slow),
        pytest.param("context=8", marks=pytest.mark.slow),
        pytest.param("context=4,expert=2", marks=pytest.mark.slow),
        pytest.param("context=2,expert=2,tensor=2"),
        pytest.param("fsdp=2,context=2,tensor=2", marks=pytest.mark.slow),
        pytest.param("slice=2,fsdp=2,context=2", marks=pytest.mark.slow),
    ],
)
def test_a_step_on_eight_devices_is_the_step_on_one(one_device, mesh):
    state, grads, metrics, text = run(mesh)
    expected_state, expected_grads, expected_metrics, _ = one_device
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    same(grads, expected_grads, 1e-5, 1e-8)
    # In the first layer all streams are equal, so comb's gradient is 0 but for rounding, and AdamW, whose eps is 1e-20, makes a
    # full step of it in a random direction: such entries of its parameters say nothing. Muon's are all compared.
    noise = jax.tree_util.tree_map_with_path(
        lambda path, g: (np.abs(g) < 1e-5 * np.abs(g).max()) & (optimizer_of(tuple(key.key for key in path)) == "adamw"),
        expected_grads,
    )
    got, want = (jax.tree.map(lambda a, skip: np.where(skip, 0, a), s.params, noise) for s in (state, expected_state))
    assert sum(skip.sum() for skip in jax.tree.leaves(noise)) < 0.02 * sum(g.size for g in jax.tree.leaves(expected_grads))
    same(got, want, 1e-5, 1e-4 * CFG.learning_rate)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(state.router), jax.tree.leaves(expected_state.router), strict=True):
        np.testing.assert_array_equal(a, b, jax.tree_util.keystr(path))
    assert "all-reduce" in text or "reduce-scatter" in text


def same(got, expected, relative, absolute):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        bound = relative * np.linalg.norm(b) + absolute * b.size**0.5
        assert np.linalg.norm(a - b) <= bound, (jax.tree_util.keystr(path), np.linalg.norm(a - b), np.linalg.norm(b))
