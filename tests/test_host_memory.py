"""Optimizer state in the host's memory: the same numbers, checkpoints that fit both, one error."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from small_runs import small_run, write_text

import v4jax
from sharding import host_memory
from sharding.host_memory import check_host_memory, is_on_host
from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import AxisRules, layout_for
from v4jax.checkpoint.store import Store
from v4jax.train.finite import not_finite
from v4jax.train.loop import train
from v4jax.train.resume import items_of, load
from v4jax.train.stability import LossHistory
from v4jax.train.step import batch_sharding, compile_step, init_state, state_shardings

BOTH = ("device", "host")
CFG = small_run("unused", "unused", warmup_steps=0, batch_size=8)


def batch_of():
    rng = np.random.default_rng(0)
    return {"tokens": rng.integers(0, CFG.model.vocab_size, (8, CFG.seq_len)).astype(np.int32)}


def second_step(memory: str, mesh: str, layout: str = "full"):
    """(state after it, where its optimizer's arrays lie, metrics); the first was on the device."""
    sizes = parse_mesh(mesh)
    rules = layout_for(layout, sizes) if mesh else AxisRules()
    device_mesh = make_mesh(sizes)
    with jax.set_mesh(device_mesh):
        batch = jax.device_put(batch_of(), batch_sharding(rules, device_mesh))
        state = init_state(CFG, state_shardings(CFG, rules, device_mesh))
        for one in ("device", memory):
            cfg = dataclasses.replace(CFG, optimizer_memory=one)
            places = state_shardings(cfg, rules, device_mesh)
            state = jax.device_put(state, places)
            state, metrics = compile_step(cfg, rules, places, device_mesh)(state, batch)
        assert not_finite(state) is None
    where = {
        (is_on_host(leaf.sharding), leaf.ndim > 0) for leaf in jax.tree.leaves(state.optimizer)
    }
    assert not any(is_on_host(leaf.sharding) for leaf in jax.tree.leaves(state.public))
    return jax.tree.map(np.asarray, state), where, jax.device_get(metrics)


MESHES = [
    ("", "full", 0),
    # XLA fuses AdamW's step with what follows it or not, and a fused product and sum round once.
    pytest.param("fsdp=2,expert=2,tensor=2", "full", 1e-7, marks=pytest.mark.long),
]


@pytest.mark.parametrize("mesh, layout, tolerance", MESHES)
def test_a_step_is_the_same_numbers(mesh, layout, tolerance, monkeypatch):
    """Bit for bit on one device: only the place between steps differs."""
    monkeypatch.setattr(host_memory, "SLICE", 2**10)  # stacks take several slices
    (on_device, here, metrics), (on_host, there, metrics_there) = (
        second_step(memory, mesh, layout) for memory in BOTH
    )
    assert here == {(False, True), (False, False)}
    assert there == {(True, True), (False, False)}  # only scalars stay on the device
    near = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(near, on_host, on_device)
    assert metrics.keys() == metrics_there.keys()
    for name, value in metrics.items():
        near(metrics_there[name], value)


SHAPES = [(4,), (48, 6), (6, 4, 2), (1, 2, 2), (7, 6), (14, 4, 4)]
FIRST, SECOND = PartitionSpec("fsdp"), PartitionSpec(None, "fsdp")
CUTS = [
    *((shape, None) for shape in SHAPES),
    *((shape, FIRST) for shape in SHAPES if shape[0] % 2 == 0),
    *((shape, SECOND) for shape in SHAPES if len(shape) > 1),
]
"""(shape, how two devices cut it): all that they can; JAX places no half rows."""


@pytest.mark.parametrize("shape, spec", CUTS)
def test_slices_give_what_whole_arrays_give(shape, spec, monkeypatch):
    """A first axis that slices cannot cut evenly, or of a matrix by 8 rows, is not cut."""
    monkeypatch.setattr(host_memory, "SLICE", 64)

    def f(pair, g):
        a, b = pair
        return (a + g, b * g), a - b

    rng = np.random.default_rng(0)
    a, b, g = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
    mesh = make_mesh(parse_mesh("" if spec is None else "fsdp=2"))
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, spec or PartitionSpec())
        away = jax.device_put((a, b), host_memory.on_host(place))
        run = jax.jit(lambda away, g: host_memory.slice_by_slice(f, away, g, spec))
        (x, y), z = run(away, jax.device_put(g, place))
    np.testing.assert_array_equal(x, a + g)
    np.testing.assert_array_equal(y, b * g)
    np.testing.assert_array_equal(z, a - b)
    assert is_on_host(x.sharding) and is_on_host(y.sharding) and not is_on_host(z.sharding)


def test_a_checkpoint_fits_either_memory(tmp_path):
    """It does not say where its state lay."""
    cfg = dataclasses.replace(CFG, optimizer_memory="host")
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


@pytest.mark.long
def test_a_run_resumes_bit_for_bit(tmp_path):
    """test_resume_choices.py resumes with the state elsewhere."""
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
