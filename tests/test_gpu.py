"""Programs compiled for GPUs that are not there (extra `gpu`).

Experts' tokens travel by a ragged all-to-all, and only as needed.
"""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_mesh import CFG

from sharding.experts import Groups
from sharding.targets import topology_mesh
from v4jax.kernels.expert_ffn import gpu
from v4jax.kernels.expert_ffn.adapted import ExpertPairs, adapted_ffn
from v4jax.kernels.expert_ffn.formulas import Activation, ExpertWeights
from v4jax.planner import report_layout
from v4jax.quant.packed import Packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="needs the extra `gpu`: pip install -e '.[gpu]'",
    ),
]


def test_a_step_compiles_for_two_hosts_of_h100():
    model = CFG.model.replace(
        num_hidden_layers=1,
        compress_ratios=(4, 0),
        num_hash_layers=0,
        hidden_size=256,
        moe_intermediate_size=64,
    )
    cfg = dataclasses.replace(
        CFG,
        model=model,
        batch_size=16,
        mesh="fsdp=2,expert=4,tensor=2",
        layout="pod",
        dtype="bfloat16",
    )
    report = report_layout(cfg, "h100:16", estimate="compiler")
    sent = {(axes, kind): size for axes, kind, _, size in report.collectives}
    for key in (("expert", "ragged-all-to-all"), ("fsdp", "all-gather"), ("tensor", "all-reduce")):
        assert sent[key] > 0, sent
    sent_bytes, least = report.expert_bytes
    assert least <= sent_bytes <= 1.25 * least
    assert report.timing.parts["attention"][0] > 0 and report.timing.parts["attention"][1] > 0
    assert report.timing.step_seconds > report.timing.computing_seconds > 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernels_compile(dtype):
    """The kernels compile at widths of which some are no multiple of a whole tile.

    Their numbers: tests/kernels/test_expert_ffn.py, and benchmarks/gpu.py on a GPU.
    """
    mesh = topology_mesh("h100:1", {"data": 1})

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    for size, narrow, wide in ((16, 48, 160), (128, 1024, 2048)):
        groups = Groups(array(jnp.int32, 8), array(jnp.int32, 40), array(jnp.int32))
        x, w, ct = (
            array(dtype, 40 * size, narrow),
            array(dtype, 8, narrow, wide),
            array(dtype, 40 * size, wide),
        )
        with jax.set_mesh(mesh):
            for kernel, operands in (
                (gpu.grouped_dot, (x, w)),
                (gpu.grouped_back, (ct, w)),
                (gpu.grouped_outer, (x, ct)),
            ):
                assert "triton" in jax.jit(kernel).lower(*operands, groups).compile().as_text()


def test_a_loop_over_layers_reads_packed_experts_as_they_lie():
    """Turned around for the backward pass, those of all layers would be copied before the loop."""
    mesh, (layers, experts, side, blocks) = topology_mesh("h200:1", {"data": 1}), (3, 4, 64, 8)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    codes = array(jnp.uint8, layers, experts, side // 2, side)
    packed = Packed(codes, array(jnp.uint8, layers, experts, side // 32, side), "mxfp4")
    groups = Groups(array(jnp.int32, experts), array(jnp.int32, blocks), array(jnp.int32))

    def total(x, gate, stack, groups):
        @jax.checkpoint
        def layer(x, w):
            return x + adapted_ffn(Activation(10.0), w, ExpertPairs(), x, gate, groups), None

        return jax.lax.scan(layer, x, stack)[0].sum()

    x, gate = array(jnp.bfloat16, 16 * blocks, side), array(jnp.float32, 16 * blocks)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(total)).lower(x, gate, ExpertWeights(*3 * [packed]), groups)
        text = step.compile().as_text()
    assert "triton" in text
    assert not re.search(r"= u8\[3,\S* (transpose|copy)\(", text)


@pytest.mark.parametrize(
    "target, line",
    [
        ("h100:12", "must be h100:N with N up to 8, or a multiple of 8"),
        ("h100:8", "mesh has 4 devices"),
    ],
)
def test_bad_targets(target, line):
    with pytest.raises(ValueError, match=line):
        report_layout(dataclasses.replace(CFG, mesh="expert=4"), target)
