"""The estimate of a layout: exact where it can be, else near the compiled program; consistent."""

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from test_mesh import CFG

from configs import flash, pro
from sharding.matrices import on_whole_matrices
from sharding.mesh import make_mesh, parse_mesh
from sharding.params import bytes_per_device
from sharding.rules import layout_for
from v4jax.parameter_tree import abstract_params
from v4jax.planner.command import compare, examine
from v4jax.planner.estimate import estimate
from v4jax.planner.hardware import hardware_of
from v4jax.planner.host import SLICES
from v4jax.planner.muon import muon, product_rate
from v4jax.planner.nearest import checked, nearest_mesh
from v4jax.planner.notes import notes, parameters
from v4jax.planner.request import Request
from v4jax.planner.roofline import exchange_time
from v4jax.planner.search import as_estimated, factorings, policies_of, search
from v4jax.planner.weights import weights_of
from v4jax.remat import POLICIES
from v4jax.train.step import state_from, state_shardings

V5P = hardware_of("v5p")


def full(config, mesh, layout="pod", **changes):
    return dataclasses.replace(
        config.get_config(),
        mesh=mesh,
        layout=layout,
        stages=(),
        attention="sparse",
        index_learning_rate=0.0,
        **({"seq_len": 4096, "batch_size": 128, "gradient_accumulation": 1} | changes),
    )


@pytest.mark.parametrize(
    "mesh, layout",
    [
        ("fsdp=2,expert=2,tensor=2", "full"),
        pytest.param("context=2,expert=4", "pod", marks=pytest.mark.slow),
    ],
)
def test_weights_and_optimizer_are_exact(mesh, layout):
    cfg = dataclasses.replace(CFG, mesh=mesh, layout=layout)
    sizes = parse_mesh(mesh)
    places = state_shardings(cfg, layout_for(layout, sizes), make_mesh(sizes))
    state = jax.eval_shape(functools.partial(state_from, cfg), abstract_params(cfg.model))
    memory = estimate(cfg, V5P).memory
    assert memory["weights"] + memory["optimizer"] == pytest.approx(
        bytes_per_device(state, places), rel=1e-3
    )


@pytest.mark.parametrize(
    "mesh, layout",
    [
        ("fsdp=2,expert=2,tensor=2", "full"),
        ("data=4,expert=2", "ep"),
        ("context=2,expert=4", "pod"),
        ("fsdp=8", "fsdp"),
    ],
)
def test_estimated_muon_is_the_program(mesh, layout):
    """The whole matrices of a device, and what it sends for them, are those of a traced program."""
    sizes = parse_mesh(mesh)
    rules, mesh = layout_for(layout, sizes), make_mesh(sizes)
    weights = [weight for weight in weights_of(CFG.model) if weight.optimizer == "muon"]
    arrays = [jax.ShapeDtypeStruct(weight.shape, jnp.float32) for weight in weights]
    stacks, sent = [], collections.Counter()

    def f(x):
        stacks.append((x.shape[1:], len(x)))
        return x

    with jax.set_mesh(mesh):
        program = jax.make_jaxpr(
            lambda arrays: on_whole_matrices(
                f, arrays, [rules.spec(weight.axes) for weight in weights]
            )
        )(arrays)
    for name, axis, size in moves(program.jaxpr):
        if sizes[axis] > 1:
            sent[axis, name] += size * (sizes[axis] - 1) // sizes[axis]
    found = muon(CFG, rules, sizes)
    assert sorted((stack.shape, stack.count) for stack in found.stacks) == sorted(stacks)
    paper = collections.Counter()
    for axis, kind, size in found.sent:
        paper[axis, kind] += size
    assert paper == sent


def moves(jaxpr):
    """(kind, mesh axis, bytes of the result) of every collective."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("all_gather", "all_to_all"):
            axes = eqn.params["axis_name"]
            (axis,) = axes if isinstance(axes, tuple) else (axes,)
            (out,) = eqn.outvars
            yield (
                eqn.primitive.name.replace("_", "-"),
                axis,
                out.aval.size * out.aval.dtype.itemsize,
            )
        for inner in jax.tree.leaves(
            list(eqn.params.values()),
            is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr"),
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from moves(getattr(inner, "jaxpr", inner))


def test_full_models_have_their_parameters_and_flops():
    found = estimate(full(flash, "fsdp=8,expert=16"), V5P)
    # 291B weights with MTP, float32, each once; half a matrix more than momentum for AdamW's two
    # moments of embedding and head.
    assert found.memory["weights"] * 128 == pytest.approx(4 * 291e9, rel=0.01)
    # Rematerialised, so at least 4/3 of the model's FLOPs.
    executed = 128 * sum(flops for part, (flops, *_) in found.parts.items() if part != "optimizer")
    counted = found.mfu * found.step_seconds * V5P.bf16_flops * 128
    assert 1.3 < executed / counted < 2
    assert found.fits and 0.05 < found.mfu < 0.6


def test_a_part_with_rates_of_its_own_is_timed_by_them():
    cfg = full(flash, "fsdp=8,expert=16")
    found = estimate(cfg, V5P).parts
    products, reads = V5P.shares("head")
    half = {"head": (products / 2, reads / 2)}
    slower = estimate(cfg, dataclasses.replace(V5P, rates=V5P.rates | half)).parts
    assert slower["head"][2] == pytest.approx(2 * found["head"][2])
    assert slower["attention"] == found["attention"]


def test_what_a_layout_cuts_is_held_and_sent_less():
    one, two = (
        estimate(full(flash, mesh, layout, batch_size=256), V5P)
        for mesh, layout in (("fsdp=8,expert=16", "pod"), ("fsdp=16,expert=16", "pod"))
    )
    assert two.memory["weights"] == pytest.approx(one.memory["weights"] / 2, rel=0.01)
    exchange = ("expert",), "ragged-all-to-all"
    assert two.sent[exchange][0] == pytest.approx(
        one.sent[exchange][0] / 2
    )  # half the rows a device
    gathered = estimate(full(flash, "fsdp=8,expert=16", "full"), V5P)
    # Gathering tokens sends n-1 rows a token, exchanging them K (n-1)/n.
    assert gathered.sent[("expert",), "all-gather"][0] == pytest.approx(
        one.sent[exchange][0] / 2 / 2 * 16 / 6, rel=0.1
    )


def test_decoding_reads_caches_and_weights():
    cfg = full(flash, "expert=16", "ep", batch_size=16, seq_len=2**20)
    found, released = estimate(cfg, V5P, "decode"), estimate(cfg, V5P, "decode", released=True)
    assert found.bound == "memory traffic" and found.memory["gradients"] == 0
    assert released.memory["weights"] < 0.5 * found.memory["weights"]
    # v4jax cost configs/flash.py: one row's caches. Rings are longer by the rows that may be taken
    # back.
    assert released.memory["caches"] == pytest.approx(3.69e9, rel=0.01)
    # 512 + 128 numbers in bf16 instead of 583 + 68 bytes.
    assert found.memory["caches"] == pytest.approx(released.memory["caches"] * 1280 / 651, rel=0.01)


def test_time_of_an_exchange():
    sizes = parse_mesh("fsdp=4,expert=8,tensor=2")
    h100 = dataclasses.replace(hardware_of("h100"), network=1.0, latency=0.0)
    seconds = functools.partial(exchange_time, device=h100, sizes=sizes)
    # Tensor pairs and groups of 4 experts lie within a node of 8; fsdp groups have one device a
    # node.
    assert seconds(1e9, 1, ("tensor",), "all-reduce") == pytest.approx(1e9 / 450e9)
    assert seconds(3e9, 1, ("fsdp",), "all-gather") == pytest.approx(3e9 / 50e9)
    # 8 experts on two nodes: of 7/8 of the rows sent, 4/8 go to the other node and 3/8 stay.
    assert seconds(7e9, 1, ("expert",), "all-to-all") == pytest.approx(3e9 / 450e9 + 4e9 / 50e9)
    # A gather over the same: 1/8 of the whole between nodes, 3/4 inside.
    assert seconds(7e9, 1, ("expert",), "all-gather") == pytest.approx(6e9 / 450e9 + 1e9 / 50e9)


def test_a_search_ranks_what_fits_and_says_why():
    cfg = dataclasses.replace(CFG, batch_size=16)
    found = search(cfg, hardware_of("cpu"), 8)
    times = [e.step_seconds for e in found.ranked]
    assert times == sorted(times) and found.tried >= len(found.ranked) > 10
    for one in found.front:
        assert not any(
            e.step_seconds < one.step_seconds and e.memory_bytes < one.memory_bytes
            for e in found.ranked
        )
    assert found.ranked[0].mesh in found.why() and "times as long" in found.why()
    assert found.rejected["tensor beyond the output groups"] > 0


def test_a_search_tries_remat_policies():
    """What keeps more computes less and holds more."""
    cfg = dataclasses.replace(CFG, batch_size=16)
    roomy = search(cfg, V5P, 8, policies=policies_of(cfg, V5P, "train"))
    found = {(one.layout, one.mesh, one.remat): one for one in roomy.ranked}
    assert {remat for _, _, remat in found} == set(POLICIES)
    layer = [one for one in roomy.ranked if one.remat == "layer"]
    assert layer == list(search(cfg, V5P, 8).ranked)
    for one in layer:
        other = found[one.layout, one.mesh, "none"]
        assert other.step_seconds <= one.step_seconds and other.memory_bytes > one.memory_bytes
    first = next(one for one in roomy.ranked if one.remat == "none")
    assert as_estimated(cfg, first).remat == "none"
    assert policies_of(cfg, V5P, "decode") == ("layer",)
    assert "offload" not in policies_of(cfg, hardware_of("cpu"), "train")


def test_factorings():
    assert list(factorings(4, 2)) == [(1, 4), (2, 2), (4, 1)]
    assert all(math.prod(f) == 1024 for f in factorings(1024, 5))


def test_what_cannot_be_names_the_nearest_that_can():
    for changes, target, line in [
        ({"mesh": "fsdp=2", "batch_size": 3}, "cpu", "nearest: --batch 4"),
        ({"mesh": "fsdp=4,expert=2"}, "v5p:2x2x4", "nearest mesh: fsdp=4,expert=4"),
    ]:
        with pytest.raises(ValueError, match=line):
            checked(dataclasses.replace(CFG, **changes), Request(target))
    with pytest.raises(
        ValueError, match="nothing fits on 8 devices of NVIDIA H100 SXM.*try --chips"
    ):
        search(full(flash, "", batch_size=8), hardware_of("h100"), 8)
    with pytest.raises(ValueError, match="--batch 8"):
        search(dataclasses.replace(CFG, batch_size=7, seq_len=135), hardware_of("cpu"), 8)
    assert (
        nearest_mesh(CFG, parse_mesh("tensor=2,expert=4"), 16) == "expert=8,tensor=2"
    )  # two output groups: tensor stays


def test_an_estimated_look_warns():
    found = examine(full(flash, "fsdp=8,expert=16", "ep_fsdp"), Request("v5p:128", paper=True))
    text = "\n".join(found.notes)
    assert found.compiled is None and "embed/weight" not in text
    assert "wait for the busiest" in text
    replicated = examine(full(flash, "expert=128", "ep"), Request("tpu7x:4x4x4", paper=True))
    assert "is held 128 times" in "\n".join(replicated.notes)
    assert "gather" not in text
    rows = parameters(full(flash, "fsdp=8,expert=16"))
    assert (
        "experts" in rows[0][0] and rows[0][4] >= rows[-1][4] and rows[0][3] == "-, expert, fsdp, -"
    )


def test_gathering_once_a_step_holds_more_and_sends_less():
    cfg = full(flash, "fsdp=32,expert=4", "ep_fsdp", batch_size=1024, gradient_accumulation=8)
    layer, step = (
        estimate(dataclasses.replace(cfg, gather=gather), V5P) for gather in ("micro_batch", "step")
    )
    # An expert's share and everything else, in bfloat16.
    whole = step.memory["weights"] - layer.memory["weights"]
    assert 2 * 284e9 / 4 < whole < 2 * 284e9 / 4 * 1.1 + 2 * 15e9
    gathered = [
        sum(row[0] for (_, kind), row in one.sent.items() if kind == "all-gather")
        for one in (layer, step)
    ]
    assert gathered[1] < gathered[0] / 8
    text = "\n".join(notes(cfg, layer, V5P))
    assert "With gather=step a device would hold" in text and "does not fit" in text


def test_operands_in_fp8_are_made_first():
    """One layer's bytes, counted by hand.

    They are what enters and leaves its products, a byte each for either pass, and its matrices.
    """
    tiny = CFG.model.replace(
        num_hidden_layers=1, num_hash_layers=0, num_nextn_predict_layers=0, compress_ratios=(0,)
    )
    cfg = dataclasses.replace(
        CFG, model=tiny, mesh="", layout="full", batch_size=1, dtype="bfloat16", remat=False
    )
    with_fp8, without = (estimate(cfg, hardware_of("h100"), fp8=fp8).parts for fp8 in (True, False))
    d, f, k, heads = (
        tiny.hidden_size,
        tiny.moe_intermediate_size,
        tiny.num_experts_per_tok + 1,
        tiny.num_attention_heads * tiny.head_dim,
    )
    groups, q = tiny.o_groups * tiny.o_lora_rank, tiny.q_lora_rank
    rows = (d + q + heads + groups + k * (d + f)) + (
        q + tiny.head_dim + heads + groups + d + k * (2 * f + d)
    )
    matrices = (
        d * (q + tiny.head_dim)
        + q * heads
        + heads * tiny.o_lora_rank
        + groups * d
        + 3 * d * f * (tiny.n_routed_experts + 1)
    )
    assert "fp8 operands" not in without
    assert with_fp8["fp8 operands"][1] == 4 * (cfg.seq_len * rows + matrices)


def test_two_layouts_side_by_side():
    pair = compare(
        full(flash, ""), Request("v5p"), ["pod:fsdp=8,expert=16", "full:fsdp=8,expert=16"]
    )
    rows = {row[0]: row for row in pair.rows()}
    assert float(rows["exchanges"][3]) > 1 and rows["memory"][3]
    with pytest.raises(ValueError, match="must be LAYOUT:MESH"):
        compare(full(flash, ""), Request("v5p"), ["pod", "full"])


@pytest.mark.parametrize(
    "chips, second, words",
    [
        ("v5p", "full:fsdp=8,expert=16", []),
        ("v5p", "ep:expert=128", ["warning: one does not fit: ep: expert=128 needs "]),
        ("v6e", "ep:expert=128", ["warning: neither fits: pod: fsdp=8,expert=16 needs "]),
    ],
)
def test_a_comparison_says_what_does_not_fit(chips, second, words):
    pair = compare(full(flash, ""), Request(chips), ["pod:fsdp=8,expert=16", second])
    assert [line[: len(word)] for line, word in zip(pair.lines(), words, strict=True)] == words
    assert pair.to_dict()["warnings"] == pair.lines()


@pytest.mark.slow
def test_a_search_of_a_pod_takes_less_than_a_minute():
    import time

    start = time.perf_counter()
    found = search(full(pro, "", batch_size=1024), V5P, 1024)
    assert time.perf_counter() - start < 60
    assert found.ranked and found.ranked[0].layout == "pod"


def test_what_lies_on_the_host_is_not_on_the_device_and_takes_time_to_copy():
    cfg = dataclasses.replace(CFG, mesh="fsdp=8", layout="fsdp", dtype="bfloat16")
    away = dataclasses.replace(cfg, optimizer_memory="host", remat="offload")
    here, there = estimate(cfg, V5P), estimate(away, V5P)
    assert here.host == here.copies == {} and set(there.host) == {"optimizer", "streams"}
    assert there.host["optimizer"] == pytest.approx(here.memory["optimizer"])
    assert there.memory["optimizer"] == SLICES
    rate = V5P.host_bandwidth * V5P.network
    copied, seconds = there.copies["optimizer"]
    assert copied == 2 * there.host["optimizer"] and seconds == pytest.approx(copied / rate)
    added = sum(seconds for _, seconds in there.copies.values())
    assert there.step_seconds == pytest.approx(here.step_seconds + added)

    # Streams go there and back once a micro-batch, the optimizer's state once a step.
    two = estimate(dataclasses.replace(away, gradient_accumulation=2, batch_size=16), V5P)
    assert two.copies["optimizer"] == there.copies["optimizer"]
    assert two.copies["streams"][0] == pytest.approx(2 * there.copies["streams"][0])
    assert two.host["streams"] == pytest.approx(there.host["streams"])


def test_a_link_that_is_not_known_takes_no_time_and_is_warned_of():
    cfg = dataclasses.replace(CFG, mesh="fsdp=8", layout="fsdp", optimizer_memory="host")
    hardware = hardware_of("tpu7x")
    found = estimate(cfg, hardware)
    assert found.copies["optimizer"][1] == 0
    assert any("TPU7x (Ironwood)'s link" in line for line in notes(cfg, found, hardware))


def test_newton_schulz_runs_at_the_rate_of_its_factors():
    """Float32 factors are rounded to TF32 on a GPU, at half the bfloat16 rate, and not on a TPU."""
    rounded = dataclasses.replace(CFG, newton_schulz_dtype="bfloat16")
    for name, times in (("h100", 2), ("v5p", 1)):
        device = hardware_of(name).of_a_device(8)
        assert product_rate(rounded, device) == device.bf16_flops
        assert product_rate(rounded, device) == pytest.approx(times * product_rate(CFG, device))
