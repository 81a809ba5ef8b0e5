"""A step on 8 devices is the step on one.

Loss, gradients through the optimizer, router bias and loads agree.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from reference.weights import random_weights

from sharding.audit import collectives
from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import LAYOUTS, AxisRules, layout_for
from v4jax.checkpoint.names import from_official
from v4jax.config import ModelConfig, RopeScaling
from v4jax.planner import least_expert_bytes, sent_to_experts
from v4jax.train.config import TrainConfig
from v4jax.train.muon import optimizer_of
from v4jax.train.step import TrainState, batch_sharding, compile_step, state_from, state_shardings

MODEL = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    moe_intermediate_size=16,
    num_hidden_layers=5,
    num_attention_heads=4,
    head_dim=16,
    qk_rope_head_dim=8,
    q_lora_rank=16,
    o_groups=2,
    o_lora_rank=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    routed_scaling_factor=1.5,
    compress_ratios=(0, 4, 128, 4, 128, 0),
    num_hash_layers=1,
    sliding_window=8,
    index_n_heads=8,
    index_head_dim=16,
    index_topk=4,
    compress_rope_theta=160000.0,
    rope_scaling=RopeScaling(),
)
SMALL = MODEL.replace(num_hidden_layers=3, compress_ratios=(128, 4, 4, 0))
"""Every kind of attention and of routing, and two CSA layers that are scanned over."""
CFG = TrainConfig(
    model=MODEL,
    run_dir="unused",
    steps=4,
    batch_size=8,
    seq_len=136,
    learning_rate=1e-3,
    warmup_steps=0,
    remat=True,
    clip_norm=1e9,
)


def batch_of():
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 3, (8, 136)), axis=1)[:, ::-1]
    return {
        "tokens": rng.integers(0, 96, (8, 136)).astype(np.int32),
        "segment_ids": segments.astype(np.int32),
    }


def run(model: ModelConfig, mesh: str, layout: str | AxisRules = "full"):
    """(state after a step, gradients, metrics, compiled text) on `mesh`."""
    cfg = dataclasses.replace(CFG, model=model)
    sizes = parse_mesh(mesh)
    rules = layout_for(layout, sizes) if mesh else AxisRules()
    device_mesh = make_mesh(sizes)
    with jax.set_mesh(device_mesh):
        places = state_shardings(cfg, rules, device_mesh)
        # Weights have trained scale: AdamW's eps of 1e-20 would turn gradients that are rounding
        # noise into full steps.
        params = from_official(model, random_weights(model, 0))
        fresh = jax.jit(functools.partial(state_from, cfg), out_shardings=places)
        state: TrainState = fresh(params)
        batch = jax.device_put(batch_of(), batch_sharding(rules, device_mesh))
        step = compile_step(cfg, rules, places, device_mesh).lower(state, batch).compile()
        state, metrics = step(state, batch)
    state = jax.tree.map(np.asarray, state)
    return (
        state,
        gradients(state.optimizer),
        {k: float(v) for k, v in metrics.items()},
        step.as_text(),
    )


def gradients(optimizer) -> dict:
    """Path of a parameter -> its gradient of the first step.

    Muon's momentum is G then, AdamW's first moment 0.1 G.
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(optimizer):
        fields = {str(getattr(key, "name", "")) for key in path}
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if fields & {"momentum", "mu"}:
            found[tuple(keys[1:])] = leaf * (10 if "mu" in fields else 1)
    return found


@functools.cache
def on_one_device(model: ModelConfig):
    return run(model, "")


FEW_LAYERS = [("fsdp=2,expert=2,tensor=2", "full"), ("context=2,expert=2,tensor=2", "pod")]
SLOW = [  # those that cut the sequence, and a layout of one's own: test_mesh_context.py
    ("data=8", "dp"),
    ("fsdp=8", "fsdp"),
    ("expert=8", "ep"),
    ("data=2,fsdp=2,expert=2", "ep_fsdp"),
    ("expert=4,tensor=2", "ep_tp"),
    ("data=2,tensor=4", "full"),
    ("data=2,expert=2,tensor=2", "full"),
]


@pytest.mark.parametrize(("mesh", "layout"), FEW_LAYERS)
def test_a_step_on_eight_devices_is_the_step_on_one(mesh, layout):
    check_step(SMALL, mesh, layout)


@pytest.mark.parametrize(
    ("mesh", "layout"),
    [pytest.param(*one, marks=pytest.mark.long) for one in SLOW[:-1]]
    + [pytest.param(*SLOW[-1], marks=pytest.mark.slow)],
)
def test_a_step_of_more_layers_on_eight_devices_is_the_step_on_one(mesh, layout):
    check_step(MODEL, mesh, layout)


def check_step(model: ModelConfig, mesh: str, layout: str | AxisRules):
    """A step of `model` on `mesh` is that on one device, and nothing travels that need not."""
    state, grads, metrics, text = run(model, mesh, layout)
    expected_state, expected_grads, expected_metrics, _ = on_one_device(model)
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    assert len(grads) > 80
    for path, expected in expected_grads.items():
        same(path, grads[path], expected, 1e-5, 1e-8)
    weights, expected_weights = (flatten_dict(s.params) for s in (state, expected_state))
    skipped = 0
    for path, expected in expected_weights.items():
        # In the first layer all streams are equal, so comb's gradient is 0 but for rounding. AdamW,
        # whose eps is 1e-20, makes a full step of it in a random direction, so such entries of its
        # parameters say nothing. Muon's are all compared; Newton-Schulz brings the gradient's small
        # singular values, and their rounding, to the size of the large ones (1.2e-5 in mHC's fn on
        # jax 0.12 with AVX-512).
        said, relative = np.ones(expected.shape, bool), 2e-5
        if optimizer_of(path) == "adamw":
            said, relative = (
                np.abs(expected_grads[path]) >= 1e-5 * np.abs(expected_grads[path]).max(),
                1e-5,
            )
        skipped += np.sum(~said)
        same(path, weights[path] * said, expected * said, relative, 1e-4 * CFG.learning_rate)
    assert skipped < 0.02 * sum(leaf.size for leaf in expected_weights.values())
    for path, expected in flatten_dict(expected_state.router).items():
        np.testing.assert_array_equal(flatten_dict(state.router)[path], expected, str(path))
    check_traffic(text, model, mesh, layout)


def check_traffic(text: str, model: ModelConfig, mesh: str, layout: str | AxisRules):
    """Expert weights do not travel over axes that hold them, nor logits or router scores.

    Tokens travel only as needed.
    """
    sizes = parse_mesh(mesh)
    rules, found = layout_for(layout, sizes), collectives(text, make_mesh(sizes))
    assert any(
        one.kind in ("all-reduce", "reduce-scatter") for one in found
    )  # gradients are summed
    for one in found:
        if "optimizer" in one.source:
            continue
        assert "top_k" not in one.source, one
        if one.kind == "all-gather":
            assert len(one.shape) < 3 or one.shape[-1] != model.vocab_size, one
        if one.kind == "all-gather" and {"expert", "tensor"} & set(one.axes):
            assert (
                one.shape[-2:] not in ((32, 16), (16, 32)) or "/experts/shard_map" not in one.source
            ), one
    least = least_expert_bytes(dataclasses.replace(CFG, model=model), rules, sizes)
    if (
        least and not rules.exchange
    ):  # XLA:CPU has no ragged all-to-all; tests/test_tpu.py looks at the real one
        assert least <= sent_to_experts(found, rules) <= 1.25 * least


@pytest.mark.parametrize(
    "layout, axes",
    [
        ("dp", "data"),
        ("fsdp", "data fsdp"),
        ("ep", "data expert"),
        ("ep_fsdp", "data fsdp expert"),
        ("ep_tp", "data expert tensor"),
    ],
)
def test_the_full_layout_on_fewer_axes_is_the_small_layout(layout, axes):
    """The meshes above, run with one layout each, thus speak for `full` too."""
    small, full = LAYOUTS[layout], LAYOUTS["full"]
    for name, where in small.table:
        assert where == tuple(
            axis for axis in full.mesh_axes(name) if axis in (*axes.split(), "slice")
        ), name


def same(path, got, expected, relative, absolute):
    bound = relative * np.linalg.norm(expected) + absolute * expected.size**0.5
    assert np.linalg.norm(got - expected) <= bound, (
        path,
        np.linalg.norm(got - expected),
        np.linalg.norm(expected),
    )
