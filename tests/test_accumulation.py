"""N micro-batches are one batch: loss, gradients, an optimizer step, router bias and loads.

Rows are packed, and micro-batches hold unequally many tokens that count.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from reference.weights import random_weights
from test_mesh import CFG as WHOLE
from test_mesh import SMALL as MODEL
from test_mesh import gradients as gradients_of
from test_mesh import optimizer_of, same

from sharding.audit import collectives, totals
from sharding.mesh import make_mesh, parse_mesh
from sharding.micro_batches import join_rows, split_rows
from sharding.rules import AxisRules, layout_for
from v4jax.checkpoint.names import from_official
from v4jax.context import Collect, Context
from v4jax.gradient_sums import with_sum
from v4jax.train.anticipate import choose_experts
from v4jax.train.config import TrainConfig
from v4jax.train.evaluation import evaluator
from v4jax.train.gradients import gradients
from v4jax.train.losses import mtp
from v4jax.train.losses.weights import LossWeights
from v4jax.train.step import (
    batch_sharding,
    check_batch,
    compile_step,
    sparse_mode,
    state_from,
    state_shardings,
)

CFG = dataclasses.replace(WHOLE, model=MODEL, index_learning_rate=1e-3)
TOLERANCE = 1e-5
"""Relative to the largest number of an array: sums in another order, in float32."""


def batch_of():
    """8 packed rows; the second half is mostly padding, and some tokens are not to be learned."""
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 3, (8, 136)), axis=1)[:, ::-1]
    segments[5:] = np.where(np.arange(136) < 24, segments[5:], 0)
    return {
        "tokens": rng.integers(0, 96, (8, 136)).astype(np.int32),
        "segment_ids": segments.astype(np.int32),
        "loss_mask": (rng.random((8, 136)) < 0.7).astype(np.int32),
    }


@functools.cache
def weights():
    return from_official(MODEL, random_weights(MODEL, 0))


def context_of(cfg: TrainConfig, rules: AxisRules = AxisRules(), watch: bool = False) -> Context:
    return Context(
        rules=rules, sparse=sparse_mode(cfg), collect=Collect(watch=watch), remat=cfg.remat
    )


@functools.cache
def one_device(cfg: TrainConfig, watch: bool = False):
    """(gradients, metrics, routing) on one device."""
    params = dict(weights())
    router = params.pop("router")
    run = jax.jit(functools.partial(gradients, cfg, context_of(cfg, watch=watch)))
    return jax.tree.map(np.asarray, run(params, router, batch_of()))


def assert_equal(got, expected, what=""):
    got, expected = flatten_dict(got), flatten_dict(expected)
    assert got.keys() == expected.keys()
    for path, value in expected.items():
        # A scalar weight's gradient is a sum over all tokens in which nearly all cancels.
        error = np.abs(got[path] - value).max()
        assert error <= TOLERANCE * np.abs(value).max() + 1e-8, (what, path)


def loads(routing):
    return {
        group: {name: route.load_E for name, route in blocks.items()}
        for group, blocks in routing.items()
    }


@pytest.mark.parametrize(
    "count", [2, pytest.param(4, marks=pytest.mark.long), pytest.param(8, marks=pytest.mark.long)]
)
def test_micro_batches_have_the_gradients_of_one_batch(count):
    cfg = dataclasses.replace(CFG, gradient_accumulation=count)
    grads, metrics, routing = one_device(cfg)
    grads_1, metrics_1, routing_1 = one_device(CFG)
    assert_equal(grads, grads_1)
    assert_equal(loads(routing), loads(routing_1))
    assert metrics.keys() == metrics_1.keys() >= {"nll", "mtp_nll", "balance", "index_captured"}
    assert_equal(metrics, metrics_1)
    assert metrics_1["mtp_nll"] > 0 and metrics_1["index_kl"] > 0 and metrics_1["balance"] > 0


def test_the_mean_of_micro_batches_is_not_the_answer():
    """The test above would not fail if every micro-batch held equally much; it does not."""
    first, second = np.split(batch_of()["segment_ids"] > 0, 2)
    assert first.sum() > 1.5 * second.sum()


@pytest.mark.slow
@pytest.mark.parametrize("attention", [pytest.param("dense", marks=pytest.mark.long), "indexer"])
def test_stages_with_dense_attention_accumulate_too(attention):
    cfg = dataclasses.replace(CFG, attention=attention)
    two = one_device(dataclasses.replace(cfg, gradient_accumulation=2))
    one = one_device(cfg)
    assert_equal(two[0], one[0])
    assert_equal(two[1], one[1])


@pytest.mark.slow
def test_diagnostics_are_those_of_all_micro_batches():
    one = one_device(CFG, watch=True)[2]
    two = one_device(dataclasses.replace(CFG, gradient_accumulation=2), watch=True)[2]
    for group, blocks in one.items():
        for name, route in blocks.items():
            got = two[group][name].diagnostics
            for field, value in route.diagnostics._asdict().items():
                if field == "gate_range":  # the largest of a micro-batch
                    assert (getattr(got, field) <= value + 1e-6).all()
                else:
                    np.testing.assert_allclose(getattr(got, field), value, rtol=1e-5, atol=1e-6)


def step_on(mesh: str, layout: str, count: int, gather: str = "micro_batch"):
    """(state after a step, metrics) of `count` micro-batches on a mesh."""
    cfg = dataclasses.replace(CFG, gradient_accumulation=count, gather=gather)
    sizes = parse_mesh(mesh)
    rules = layout_for(layout, sizes) if mesh else AxisRules()
    device_mesh = make_mesh(sizes)
    with jax.set_mesh(device_mesh):
        check_batch(cfg, rules, sizes)
        places = state_shardings(cfg, rules, device_mesh)
        state = jax.device_put(state_from(cfg, weights()), places)
        batch = jax.device_put(batch_of(), batch_sharding(rules, device_mesh))
        state, metrics = compile_step(cfg, rules, places, device_mesh)(state, batch)
        return jax.tree.map(np.asarray, (state, metrics))


@functools.cache
def one_batch():
    return step_on("", "full", 1)


LONG = pytest.mark.long
MESHES = [
    pytest.param("data=2,expert=2,tensor=2", "full", 2, "micro_batch", id="full"),
    pytest.param("fsdp=4", "fsdp", 2, "micro_batch", id="fsdp", marks=LONG),
    pytest.param("context=2,expert=2,tensor=2", "pod", 4, "micro_batch", id="pod", marks=LONG),
    pytest.param("context=2,expert=4", "cp_ep", 2, "micro_batch", id="cp_ep", marks=LONG),
    pytest.param("slice=2,expert=2", "ep_fsdp", 2, "micro_batch", id="ep_fsdp", marks=LONG),
    pytest.param("fsdp=2,expert=2,tensor=2", "full", 2, "step", id="full-step"),
    pytest.param("fsdp=2,context=2,expert=2", "pod", 2, "step", id="pod-step", marks=LONG),
    pytest.param("fsdp=4", "fsdp", 1, "step", id="fsdp-step-of-one", marks=LONG),
]


@pytest.mark.parametrize("mesh, layout, count, gather", MESHES)
def test_a_step_of_micro_batches_on_a_mesh_is_the_step_of_one_batch_on_one_device(
    mesh, layout, count, gather
):
    state, metrics = step_on(mesh, layout, count, gather)
    expected, expected_metrics = one_batch()
    for name in ("loss", "nll", "mtp_nll", "balance", "index_kl", "grad_norm", "expert_load_max"):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=TOLERANCE)
    assert_equal(state.router, expected.router)
    grads, expected_grads = (gradients_of(s.optimizer) for s in (state, expected))
    assert len(grads) > 50
    for path, value in expected_grads.items():
        same(path, grads[path], value, TOLERANCE, 1e-8)
    after = flatten_dict(state.params)
    for path, value in flatten_dict(expected.params).items():
        if optimizer_of(path) == "muon":  # AdamW: see test_mesh
            same(path, after[path], value, 2e-5, 1e-4 * CFG.learning_rate)


def test_a_weight_beside_its_sum_stays_cut():
    sizes = parse_mesh("fsdp=4")
    rules, mesh = layout_for("fsdp", sizes), make_mesh(sizes)
    names = ("embed", "q_lora")
    with jax.set_mesh(mesh):
        cut = jax.NamedSharding(mesh, rules.spec(names))
        w = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=cut)
        text = (
            jax.jit(functools.partial(with_sum, rules, names, layer=None))
            .lower(w, w)
            .compile()
            .as_text()
        )
    assert rules.mesh_axes("embed") and not collectives(text, mesh)


@pytest.mark.long
def test_micro_batches_gather_no_weight_that_one_batch_does_not():
    """Two of the size of one batch send twice as much at most, the optimizer counted twice."""
    sizes = parse_mesh("context=2,expert=4")
    rules, mesh = layout_for("pod", sizes), make_mesh(sizes)

    def sent(count: int) -> int:
        cfg = dataclasses.replace(CFG, gradient_accumulation=count, batch_size=4 * count)
        places = state_shardings(cfg, rules, mesh)
        state = jax.eval_shape(lambda: state_from(cfg, weights()))
        batch = {"tokens": jax.ShapeDtypeStruct((cfg.batch_size, 136), jnp.int32)}
        with jax.set_mesh(mesh):
            program = compile_step(cfg, rules, places, mesh).lower(state, batch).compile()
        return sum(size for _, size in totals(collectives(program.as_text(), mesh)).values())

    assert 1.5 * sent(1) < sent(2) <= 2 * sent(1)


def test_rows_come_back_in_order_and_no_row_travels():
    sizes = parse_mesh("data=4,tensor=2")
    rules = layout_for("full", sizes)
    with jax.set_mesh(make_mesh(sizes)):
        x = jax.device_put(
            np.arange(2 * 16 * 4).reshape(2, 16, 4),
            jax.NamedSharding(jax.sharding.get_mesh(), rules.spec((None, "act_batch", "act_seq"))),
        )
        split = jax.jit(functools.partial(split_rows, rules, count=2, axis=1))
        parts = split(x)
        assert parts.shape == (2, 2, 8, 4)
        back = jax.jit(functools.partial(join_rows, rules, axis=1))(parts)
        text = split.lower(x).compile().as_text()
    np.testing.assert_array_equal(back, x)
    assert not any(word in text for word in ("all-to-all", "all-gather", "collective-permute"))
    assert sorted(np.asarray(parts)[:, 0, :, 0].ravel()) == list(range(0, 64, 4))


def test_experts_chosen_ahead_and_evaluation_are_those_of_one_batch():
    batch = {name: jnp.asarray(x) for name, x in batch_of().items()}
    cfg = dataclasses.replace(CFG, gradient_accumulation=4)
    one, four = (
        jax.jit(functools.partial(choose_experts, c, AxisRules()))(weights(), batch)
        for c in (CFG, cfg)
    )
    assert one.keys() == four.keys()
    jax.tree.map(np.testing.assert_array_equal, one, four)
    losses = [evaluator(c, AxisRules(), lambda b: b)(weights(), [batch])["nll"] for c in (CFG, cfg)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=TOLERANCE)


def test_a_number_of_micro_batches_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="got 3; must be auto, or a divisor of"):
        dataclasses.replace(CFG, gradient_accumulation=3)
    cfg = dataclasses.replace(CFG, gradient_accumulation=4)
    sizes = parse_mesh("data=4,expert=2")
    with pytest.raises(ValueError, match=r"batch_size: got 8; .*gradient_accumulation=4 = "):
        check_batch(cfg, layout_for("full", sizes), sizes)


def test_a_costly_term_of_weight_0_is_left_out():
    """Others are measured at any weight: a run may learn without them and still show them."""
    assert len(list(LossWeights(mtp=0, balance=0, index=0).terms())) == 5
    costly = mtp.TERM._replace(costly=True)
    field = dataclasses.field(default=0.0, metadata={"terms": (costly,)})
    weights = dataclasses.make_dataclass(
        "WithZ", [("z", float, field)], bases=(LossWeights,), frozen=True, kw_only=True
    )
    assert costly not in [term for _, term in weights().terms()]
    assert (0.5, costly) in list(weights(z=0.5).terms())
