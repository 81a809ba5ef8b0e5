"""Optimizer state in the host's memory: the same numbers, checkpoints that fit both, one error."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest
from reference.weights import random_weights
from small_runs import small_run, write_text
from test_mesh import CFG, SMALL, batch_of

import v4jax
from sharding.host_memory import check_host_memory, is_on_host
from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import AxisRules, layout_for
from v4jax.checkpoint.names import from_official
from v4jax.checkpoint.store import Store
from v4jax.train.finite import not_finite
from v4jax.train.loop import train
from v4jax.train.resume import items_of, load
from v4jax.train.stability import LossHistory
from v4jax.train.step import batch_sharding, compile_step, init_state, state_from, state_shardings

BOTH = ("device", "host")


def two_steps(memory: str, mesh: str, layout: str = "full"):
    """(state after two steps, where its optimizer's arrays lie, metrics)."""
    cfg = dataclasses.replace(CFG, model=SMALL, optimizer_memory=memory, index_learning_rate=1e-3)
    sizes = parse_mesh(mesh)
    rules = layout_for(layout, sizes) if mesh else AxisRules()
    device_mesh = make_mesh(sizes)
    with jax.set_mesh(device_mesh):
        places = state_shardings(cfg, rules, device_mesh)
        fresh = jax.jit(functools.partial(state_from, cfg), out_shardings=places)
        state = fresh(from_official(SMALL, random_weights(SMALL, 0)))
        batch = jax.device_put(batch_of(), batch_sharding(rules, device_mesh))
        step = compile_step(cfg, rules, places, device_mesh)
        for _ in range(2):
            state, metrics = step(state, batch)
        assert not_finite(state) is None
    where = {
        (is_on_host(leaf.sharding), leaf.ndim > 0) for leaf in jax.tree.leaves(state.optimizer)
    }
    assert not any(is_on_host(leaf.sharding) for leaf in jax.tree.leaves(state.public))
    return jax.tree.map(np.asarray, state), where, jax.device_get(metrics)


MESHES = [("", "full"), pytest.param("fsdp=2,expert=2,tensor=2", "full", marks=pytest.mark.slow)]


@pytest.mark.parametrize("mesh, layout", MESHES)
def test_steps_are_the_same_numbers(mesh, layout):
    """Bit for bit: what is computed is the same, only the place between steps differs."""
    (on_device, here, metrics), (on_host, there, metrics_there) = (
        two_steps(memory, mesh, layout) for memory in BOTH
    )
    assert here == {(False, True), (False, False)}  # only scalars stay on the device
    assert there == {(True, True), (False, False)}
    jax.tree.map(np.testing.assert_array_equal, on_host, on_device)
    assert metrics == metrics_there


def test_a_checkpoint_fits_either_memory(tmp_path):
    """It does not say where its state lay."""
    cfg = dataclasses.replace(CFG, model=SMALL, optimizer_memory="host")
    mesh = make_mesh(parse_mesh(""))
    with jax.set_mesh(mesh), Store(tmp_path, writes=True) as store:
        state = init_state(cfg, state_shardings(cfg, AxisRules(), mesh))
        store.save(1, items_of(state, LossHistory()))
        store.wait()
        for memory in BOTH:
            other = dataclasses.replace(cfg, optimizer_memory=memory)
            places = state_shardings(other, AxisRules(), mesh)
            found = load(other, places, store, 1, {}).state
            jax.tree.map(np.testing.assert_array_equal, found.optimizer, state.optimizer)
            where = jax.tree.map(lambda leaf: leaf.sharding.memory_kind, found.optimizer)
            assert where == jax.tree.map(lambda place: place.memory_kind, places.optimizer)


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit(tmp_path):
    text = write_text(tmp_path / "text")

    def run(name: str, memory: str, steps: int):
        one = small_run(text, tmp_path / name, optimizer_memory=memory, checkpoint_every=2)
        one = dataclasses.replace(one, steps=steps, warmup_steps=0)
        train(one)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(v4jax.load(one.run_dir)[1])]

    run("run", "host", 2)
    np.testing.assert_equal(run("run", "host", 4), run("whole", "device", 4))


def test_a_platform_without_host_memory_is_refused():
    kinds = [types.SimpleNamespace(kind="device")]
    device = types.SimpleNamespace(platform="toaster", addressable_memories=lambda: kinds)
    with pytest.raises(ValueError, match="x: got 'y', which keeps z in.*toaster has only device"):
        check_host_memory("x: got 'y'", "which keeps z in", [device])
    with pytest.raises(ValueError, match="optimizer_memory: got 'disk'; allowed: device, host"):
        dataclasses.replace(CFG, optimizer_memory="disk")
