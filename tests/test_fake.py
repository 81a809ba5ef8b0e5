"""Claims about quant="official".

The numbers are those of the storage formats bit for bit, gradients go straight through, and the
whole forward pass rounds as the plain restatement does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import low, transformer
from reference.weights import random_weights
from trees import small_config

import v4jax
from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import AxisRules, layout_for
from v4jax.checkpoint.names import from_official
from v4jax.context import Context
from v4jax.quant import fake, fp8, mxfp4
from v4jax.train.loss import loss_and_routing


def random(shape, seed=0):
    """Rows of very different sizes, one of zeros, and one of numbers halfway between codes."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape).astype(np.float32) * np.exp2(
        rng.integers(-30, 30, (shape[0], 1))
    ).astype(np.float32)
    x[0] = 0
    x[1] = np.resize(
        np.array(
            [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -2.5, -5.0, 6.0, 27, 29, -448],
            np.float32,
        ),
        shape[1],
    )
    return x


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rounding_is_that_of_the_storage_formats(dtype):
    x = np.array(jnp.asarray(random((160, 288)), dtype).astype(jnp.float32))
    small = x[:, :96] * np.float32(2.0**-20)

    def same(got, expected):
        assert got.dtype == dtype
        np.testing.assert_array_equal(np.asarray(got.astype(jnp.float32)), expected)

    for values in (x, small):
        given = jnp.asarray(values, dtype)
        same(jax.jit(fake.fp8_weight)(given), fp8.dequantise(*fp8.quantise(values)))
        same(jax.jit(fake.mxfp4_weight)(given.T).T, mxfp4.dequantise(*mxfp4.quantise(values)))
        by_row = [fp8.dequantise(*fp8.quantise(row[None])) for row in values]  # a block of one row
        same(jax.jit(fake.fp8_input)(given), np.concatenate(by_row))
    keys = jax.jit(lambda kv: fake.fp8_keys(kv, 88))(jnp.asarray(x, dtype))
    parts = [
        [fp8.dequantise(*fp8.quantise(row[None, i : i + 64])) for i in (0, 64, 128)]
        for row in x[:, :192]
    ]
    same(keys[:, :192], np.block(parts))
    np.testing.assert_array_equal(
        np.asarray(keys[:, 192:200].astype(jnp.float32)),
        np.block([[fp8.dequantise(*fp8.quantise(row[None]))] for row in x[:, 192:200]]),
    )
    np.testing.assert_array_equal(np.asarray(keys[:, 200:].astype(jnp.float32)), x[:, 200:])


def test_mxfp4_survives_the_way_to_fp8():
    """Every e2m1 number is an e4m3 number under the same scale: that step of QAT rounds nothing."""
    packed = np.arange(256, dtype=np.uint8).view(np.int8).reshape(8, 32).repeat(2, 0)
    values = mxfp4.dequantise(packed, np.ones(mxfp4.scale_shape((16, 64)), np.float32))
    np.testing.assert_array_equal(values.astype(fp8.E4M3).astype(np.float32), values)


def test_rounding_twice_is_rounding_once():
    """A model read from an official file, whose weights are already rounded, stays what it is."""
    x = jnp.asarray(random((160, 288)))
    for rounded in (fake.fp8_weight, fake.mxfp4_weight, fake.fp8_input):
        np.testing.assert_array_equal(rounded(rounded(x)), rounded(x))


def test_hadamard_keeps_products():
    rng = np.random.default_rng(0)
    matrix = fake.hadamard(64)
    np.testing.assert_array_equal(matrix @ matrix.T, 64 * np.eye(64))
    signs = [[(-1) ** bin(i & j).count("1") for j in range(64)] for i in range(64)]
    np.testing.assert_array_equal(matrix, signs)
    q = rng.normal(size=(5, 64)).astype(np.float32)
    expected = mxfp4.dequantise(
        *mxfp4.quantise((q.astype(np.float64) @ matrix / 8).astype(np.float32))
    )
    np.testing.assert_array_equal(fake.mxfp4_rotated(jnp.asarray(q)), expected)


def test_gradients_pass_straight_through():
    """d f(round(x)) / dx is f'(round(x)): rounding counts as the identity, in input and weight."""
    rng = np.random.default_rng(1)
    x, w, ct = (
        jnp.asarray(rng.normal(size=shape).astype(np.float32))
        for shape in ((3, 64), (64, 32), (3, 32))
    )
    got = jax.grad(
        lambda x, w: jnp.sum((fake.fp8_input(x) @ fake.mxfp4_weight(w)) ** 2 * ct), argnums=(0, 1)
    )(x, w)
    low_x, low_w = fake.fp8_input(x), fake.mxfp4_weight(w)
    ct_y = 2 * (low_x @ low_w) * ct
    np.testing.assert_allclose(got[0], ct_y @ low_w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1], low_x.T @ ct_y, rtol=1e-5, atol=1e-5)


SIZES = dict(
    hidden_size=160,
    moe_intermediate_size=160,
    head_dim=96,
    qk_rope_head_dim=8,
    q_lora_rank=136,
    o_groups=2,
    o_lora_rank=72,
    num_attention_heads=4,
    index_head_dim=32,
    num_hash_layers=0,
)
"""Every axis exceeds the block size that cuts it, with a rest."""


@pytest.mark.parametrize("ratio", [pytest.param(0, marks=pytest.mark.long), 4, 128])
def test_the_forward_pass_is_that_of_the_served_model(ratio):
    """The model has one layer of each kind and MTP.

    Where float32 and float64 fall on two sides of a middle, one number of hundreds moves by a step
    (1% of a logit). So nearly all positions are compared closely and the rest loosely. Without any
    rounding all positions differ by 5% or more.
    """
    cfg = small_config(**SIZES, num_hidden_layers=1, compress_ratios=(ratio, 0))
    weights = random_weights(cfg, 0)
    params = jax.tree.map(jnp.asarray, from_official(cfg, weights))
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, 140))
    expected = transformer.forward(cfg, low.served(weights), tokens)
    got = v4jax.forward(cfg, params, jnp.asarray(tokens), quant="official")
    plain = v4jax.forward(cfg, params, jnp.asarray(tokens))
    for name, count in (("logits", 140), ("mtp_logits", 139)):
        want = getattr(expected, name)[0, :count]
        error = [
            np.abs(np.asarray(getattr(x, name))[0, :count] - want).max(-1) / np.abs(want).max()
            for x in (got, plain)
        ]
        assert np.quantile(error[0], 0.8) < 1e-5 and error[0].max() < 0.1
        assert np.quantile(error[1], 0.1) > 0.02


def test_sizes_that_do_not_fit_are_refused():
    cfg = small_config()
    for changes, message in (
        (dict(hidden_size=48), "hidden_size: got 48"),
        (dict(index_head_dim=16), "index_head_dim: got 16"),
        (dict(moe_intermediate_size=40), "moe_intermediate_size: got 40"),
    ):
        good = dict(hidden_size=64, moe_intermediate_size=32, index_head_dim=32)
        with pytest.raises(ValueError, match=message):
            fake.check_quant(cfg.replace(**good | changes), "official")
    with pytest.raises(ValueError, match="over 2 devices"):
        fake.check_quant(
            cfg.replace(hidden_size=64, moe_intermediate_size=128, index_head_dim=32), "official", 2
        )
    with pytest.raises(ValueError, match="allowed: 'none', 'official'"):
        fake.check_quant(cfg, "fp8")


@pytest.mark.slow
def test_blocks_are_the_same_on_a_mesh():
    """Cut matrices and cut hidden activations round as whole ones, forward and backward."""
    cfg = small_config(
        vocab_size=96,
        hidden_size=64,
        moe_intermediate_size=256,
        num_hidden_layers=1,
        compress_ratios=(4, 0),
        num_attention_heads=4,
        o_groups=2,
        o_lora_rank=16,
        q_lora_rank=16,
        n_routed_experts=4,
        head_dim=32,
        qk_rope_head_dim=8,
        index_head_dim=32,
        num_hash_layers=0,
    )
    params = jax.tree.map(jnp.asarray, from_official(cfg, random_weights(cfg, 0)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (4, 40)))
    sizes = parse_mesh("fsdp=2,expert=2,tensor=2")

    def value(rules):
        return jax.jit(
            jax.value_and_grad(
                lambda p: loss_and_routing(
                    cfg, p, {"tokens": tokens}, Context(rules=rules, quant="official")
                )[0]
            )
        )

    loss, grads = value(AxisRules())(params)
    with jax.set_mesh(make_mesh(sizes)):
        cut_loss, cut_grads = value(layout_for("full", sizes))(params)
    assert float(cut_loss) == pytest.approx(
        float(loss), rel=1e-4
    )  # sums in another order move a few numbers by a step
    close = [
        np.linalg.norm(a - b) <= 1e-2 * np.linalg.norm(b) + 1e-7
        for a, b in zip(jax.tree.leaves(cut_grads), jax.tree.leaves(grads), strict=True)
    ]
    assert np.mean(close) > 0.95
