"""A step of adapters: alpha and rank mean what they mean elsewhere, micro-batches are one batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from reference.weights import random_weights
from test_mesh import CFG as WHOLE
from test_mesh import SMALL, batch_of

from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import AxisRules, layout_for
from v4jax.adapters.config import Lora
from v4jax.adapters.tree import init_adapters, times
from v4jax.checkpoint.names import from_official
from v4jax.context import Context
from v4jax.train.gradients import gradients
from v4jax.train.loss import loss_and_routing
from v4jax.train.step import batch_sharding, compile_step, state_from, state_shardings

LORA = Lora(rank=4, alpha=2, targets=("wq_b", "experts.*", "head"))
MODEL = SMALL.replace(num_hidden_layers=2, compress_ratios=(4, 4, 0), num_hash_layers=1)
CFG = dataclasses.replace(WHOLE, model=MODEL, lora=LORA, init_from="unused", remat="none")


@functools.cache
def weights():
    return from_official(MODEL, random_weights(MODEL, 0))


def begun(cfg, places):
    """A first state whose b is not 0."""
    state = jax.jit(functools.partial(state_from, cfg))(weights())
    pairs = init_adapters(MODEL, LORA, jax.random.key(3))
    shift = jax.tree.map(lambda x: 0.03 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), pairs)
    params = jax.tree.map(jnp.add, state.params, {"lora": shift})
    return jax.device_put(dataclasses.replace(state, params=params), places)


def step_on(cfg, mesh: str = "", layout: str = "full"):
    """(state before, state after, metrics) of a step."""
    sizes = parse_mesh(mesh)
    rules, device_mesh = layout_for(layout, sizes) if mesh else AxisRules(), make_mesh(sizes)
    with jax.set_mesh(device_mesh):
        places = state_shardings(cfg, rules, device_mesh)
        state = begun(cfg, places)
        before = jax.tree.map(np.array, state)
        batch = jax.device_put(batch_of(), batch_sharding(rules, device_mesh))
        after, metrics = compile_step(cfg, rules, places, device_mesh)(state, batch)
        return before, *jax.tree.map(np.asarray, (after, metrics))


@functools.cache
def one_step():
    return step_on(CFG)


def test_a_step_is_adamw_on_b_and_not_on_scaled_b():
    """The weights hold scale * b; the optimizer's numbers are those of b."""
    before, after, metrics = one_step()
    scale, rate = LORA.scale, float(metrics["learning_rate"])
    assert scale == 0.5 and rate > 0

    def loss(pairs):
        return loss_and_routing(MODEL, weights() | {"lora": times(scale, pairs)}, batch_of())[0]

    plain = jax.tree.map(jnp.asarray, times(1 / scale, before.params["lora"]))
    grads = jax.jit(jax.grad(loss))(plain)
    adamw = optax.adamw(rate, 0.9, 0.95, 1e-20, weight_decay=CFG.weight_decay)
    updates, _ = adamw.update(grads, adamw.init(plain), plain)
    norm = optax.tree.norm(grads)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    want = flatten_dict(times(scale, optax.apply_updates(plain, updates)))
    moves = flatten_dict(grads)
    for path, value in flatten_dict(after.params["lora"]).items():
        said = np.abs(moves[path]) > 1e-5 * np.abs(moves[path]).max()  # AdamW follows rounding
        np.testing.assert_allclose(value[said], want[path][said], rtol=2e-4, atol=1e-7)


def test_nothing_but_pairs_moves():
    before, after, _ = one_step()
    jax.tree.map(np.testing.assert_array_equal, before.base, after.base)
    jax.tree.map(np.testing.assert_array_equal, before.router, after.router)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before.params, after.params)
    assert min(jax.tree.leaves(moved)) > 0
    for leaf in jax.tree.leaves(after.optimizer):
        assert np.ndim(leaf) == 0 or LORA.rank in leaf.shape[-2:]


def test_alpha_0_trains_nothing():
    cfg = dataclasses.replace(CFG, lora=dataclasses.replace(LORA, alpha=0.0))
    state = jax.jit(functools.partial(state_from, cfg))(weights())
    pairs = flatten_dict(state.params)
    assert all(np.all(leaf == 0) for path, leaf in pairs.items() if path[-1] == "b")


@pytest.mark.slow
def test_micro_batches_on_a_mesh_take_the_step_of_one_batch():
    _, expected, expected_metrics = one_step()
    cfg = dataclasses.replace(CFG, gradient_accumulation=2)
    _, got, metrics = step_on(cfg, "fsdp=2,expert=2", "ep_fsdp")
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5)
    first = flat_moments(expected)
    for path, value in flat_moments(got).items():
        error = np.linalg.norm(value - first[path])
        assert error <= 1e-5 * np.linalg.norm(first[path]) + 1e-8, path


def flat_moments(state):
    """AdamW's first moments, which are 0.1 of the gradients."""
    found = jax.tree_util.tree_leaves_with_path(state.optimizer)
    return {key: x for key, x in found if ".mu" in jax.tree_util.keystr(key)}


@pytest.mark.long
def test_muon_trains_pairs():
    cfg = dataclasses.replace(CFG, lora=dataclasses.replace(LORA, optimizer="muon"))
    before, after, metrics = step_on(cfg)
    rate = float(metrics["learning_rate"])
    for path, value in flatten_dict(after.params["lora"]).items():
        factor = LORA.scale if path[-1] == "b" else 1
        old = flatten_dict(before.params["lora"])[path]
        update = (value - old * (1 - rate * cfg.weight_decay)) / (rate * factor)
        assert 0.1 < np.sqrt(np.mean(update**2)) < 0.3, path  # Muon's steps have RMS 0.18


@pytest.mark.slow
def test_dropout_drops_inputs_of_pairs_by_seed_and_step():
    targets = ("attn.*", "shared_experts.*", "head", "gate", "e_proj")
    lora = Lora(rank=4, targets=targets, dropout=0.5)
    cfg = dataclasses.replace(CFG, lora=lora)
    params = jax.tree.map(jnp.asarray, dict(weights()))
    router = params.pop("router")
    pairs = jax.tree.map(lambda x: x + 0.1, init_adapters(MODEL, lora, jax.random.key(0)))
    ctx = Context(dropout=lora.dropout)
    take = jax.jit(functools.partial(gradients, cfg, ctx))

    def loss(key, low=pairs):
        return float(
            take({"lora": low}, router, batch_of(), base=params, key=jax.random.key(key))[1]["loss"]
        )

    assert loss(0) == loss(0) != loss(1)
    no_pairs = times(0, pairs)
    assert loss(0, no_pairs) == loss(1, no_pairs)  # nothing else is dropped
