"""Kernels that multiply with packed matrices give what the matrices' numbers give."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sharding.experts import Groups
from sharding.targets import topology_mesh, tpu_devices
from v4jax.kernels.expert_ffn import packed_gpu, packed_tpu
from v4jax.kernels.expert_ffn.formulas import Activation, ExpertWeights
from v4jax.kernels.expert_ffn.op import IMPLEMENTATIONS, expert_ffn
from v4jax.quant.packed import Packed, halves_of_inputs, mxfp4_exponent, mxfp4_value

EXPERTS, BLOCK = 4, 16
KERNELS = {"tpu": packed_tpu, "gpu": packed_gpu}


def packed(rng, *shape: int) -> Packed:
    """Every code, beside scales that no number of the same size shares."""
    *lead, rows, width = shape
    codes = rng.integers(0, 256, (*lead, rows // 2, width), dtype=np.uint8)
    scale = rng.integers(120, 130, (*lead, rows // 32, width), dtype=np.uint8)
    return Packed(jnp.asarray(codes), jnp.asarray(scale), "mxfp4")


def groups_of(sizes: tuple[int, ...], blocks: int) -> Groups:
    """Experts with so many blocks each; the blocks after them are not in use."""
    by_block = np.repeat(np.arange(EXPERTS), sizes)
    filler = np.full(blocks - len(by_block), EXPERTS - 1)
    return Groups(
        jnp.array(sizes, jnp.int32) * BLOCK,
        jnp.array(np.append(by_block, filler), jnp.int32),
        jnp.array(len(by_block), jnp.int32),
    )


def test_values_of_codes_are_the_numbers():
    """All 16 codes at all scales that packed weights may have."""
    code, scale = (jnp.asarray(a, jnp.int32) for a in np.mgrid[0:16, 2:253])
    codes = jnp.zeros((16, 251), jnp.uint8).at[:16].set(code.astype(jnp.uint8))
    low = Packed(codes, scale[:1].astype(jnp.uint8), "mxfp4").numbers(jnp.float32)[:16]
    np.testing.assert_array_equal(mxfp4_value(code | 0x70, mxfp4_exponent(scale)), low)


def test_inputs_are_parted_as_their_bytes():
    low, high = halves_of_inputs(jnp.arange(64)[None])
    assert low[0].tolist() == [*range(16), *range(32, 48)]
    assert high[0].tolist() == [*range(16, 32), *range(48, 64)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(0, 2, 1, 0), (1, 1, 1, 1)])
@pytest.mark.parametrize("platform", KERNELS)
def test_a_product_is_that_with_the_numbers(platform, sizes, dtype):
    """Float32: other orders of 128 summands. bfloat16: one rounding of the result."""
    kernel, rng = KERNELS[platform], np.random.default_rng(0)
    w, groups = packed(rng, EXPERTS, 128, 256), groups_of(sizes, 5)
    x = jnp.asarray(rng.standard_normal((5 * BLOCK, 128)), dtype)
    assert kernel.suits(x, w, groups)
    got = kernel.grouped_dot(x, w, groups, interpret=True)
    expert_P = np.repeat(np.asarray(groups.block_expert), BLOCK)
    x32, numbers = x.astype(jnp.float32), w.numbers(jnp.float32)
    want = jnp.einsum("pa,paz->pz", x32, numbers[expert_P], precision="highest")
    used, largest = slice(sum(sizes) * BLOCK), float(jnp.abs(want).max())
    tolerance = {"float32": 1e-6, "bfloat16": 2**-8}[dtype]
    assert got.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(
        got[used].astype(np.float32), want[used], rtol=tolerance, atol=tolerance * largest
    )


@pytest.mark.parametrize(("implementation", "platform"), [("ragged", "tpu"), ("triton", "gpu")])
def test_experts_run_on_packed_matrices(implementation, platform, monkeypatch):
    """Joined, as decoding has them; and the kernel is what multiplies."""
    rng, form = np.random.default_rng(1), Activation(7.0)
    w = ExpertWeights(packed(rng, EXPERTS, 128, 256), None, packed(rng, EXPERTS, 128, 128))
    x = jnp.asarray(rng.standard_normal((5 * BLOCK, 128)), jnp.float32)
    gate, groups = jnp.full(5 * BLOCK, 0.5), groups_of((2, 0, 1, 2), 5)
    plain = jax.tree.map(
        lambda m: m.numbers(jnp.float32), w, is_leaf=lambda m: isinstance(m, Packed)
    )
    want = expert_ffn(form, plain, x, gate, groups, "every_expert")
    assert implementation in IMPLEMENTATIONS
    text = str(jax.make_jaxpr(lambda x: expert_ffn(form, w, x, gate, groups, implementation))(x))
    assert text.count("packed_grouped_dot") > 0
    got = expert_ffn(form, w, x, gate, groups, implementation)
    largest = float(jnp.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("platform", KERNELS)
def test_many_rows_take_the_numbers_once(platform):
    """With more than two blocks an expert, and of fp8, the kernel would read them too often."""
    rng, blocks = np.random.default_rng(2), 2 * EXPERTS + 1
    w, groups = packed(rng, EXPERTS, 128, 128), groups_of((3, 2, 2, 2), blocks)
    x = jnp.zeros((blocks * BLOCK, 128))
    assert not KERNELS[platform].suits(x, w, groups)
    few = groups_of((1, 1, 1, 1), 4)
    assert KERNELS[platform].suits(x[: 4 * BLOCK], w, few)
    fp8 = Packed(jnp.zeros((EXPERTS, 128, 128), jnp.uint8), jnp.ones((EXPERTS, 1, 1)), "fp8")
    assert not KERNELS[platform].suits(x[: 4 * BLOCK], fp8, few)


def needs(extra: str, module: str):
    return pytest.mark.skipif(
        importlib.util.find_spec(module) is None,
        reason=f"needs the extra `{extra}`: pip install -e '.[{extra}]'",
    )


@pytest.mark.parametrize(
    ("platform", "target", "call"),
    [
        pytest.param(
            "tpu", "v5p:2x2x1", "tpu_custom_call", marks=[pytest.mark.tpu, needs("tpu", "libtpu")]
        ),
        pytest.param(
            "gpu", "h100:1", "triton", marks=[pytest.mark.gpu, needs("gpu", "jax_cuda13_plugin")]
        ),
    ],
)
def test_the_kernels_compile_at_sizes_of_flash(platform, target, call):
    """w1 beside w3 of 32 experts, and w2, of V4-Flash; 64 rows in blocks of 16."""
    if platform == "tpu":  # a kernel on several devices would want a shard_map
        mesh = Mesh(np.array(tpu_devices(target)[:1]), ("data",), axis_types=(AxisType.Auto,))
    else:
        mesh = topology_mesh(target, {"data": 1})

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    groups = Groups(array("int32", 32), array("int32", 36), array("int32"))
    for deep, wide in ((4096, 4096), (2048, 4096)):
        w = Packed(
            array("uint8", 32, deep // 2, wide), array("uint8", 32, deep // 32, wide), "mxfp4"
        )
        x = array("bfloat16", 36 * 16, deep)
        with jax.set_mesh(mesh):
            product = jax.jit(lambda *args: KERNELS[platform].grouped_dot(*args))
            assert call in product.lower(x, w, groups).compile().as_text()
