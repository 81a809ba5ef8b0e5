"""What the whole model promises.

No array is quadratic, remat and scan change nothing, bfloat16 stays near, cut sequences agree.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.weights import random_weights
from test_mesh import SMALL as MODEL

from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import layout_for
from v4jax.checkpoint.names import from_official
from v4jax.context import Context, SparseMode
from v4jax.functional import forward
from v4jax.kernels import attention
from v4jax.parameter_tree import abstract_params
from v4jax.train.loss import loss_and_routing


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, from_official(MODEL, random_weights(MODEL, 0)))


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            tuple(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def shapes(jaxpr):
    return (
        variable.aval.shape
        for equation in equations(jaxpr)
        for variable in equation.outvars
        if hasattr(variable.aval, "shape")
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_float32_products_are_float32_on_every_platform(dtype):
    """TPUs round the operands of a product to bfloat16, and GPUs to TF32, unless it asks for more.

    Router, mHC and compressors ask.
    """
    train_indexer = SparseMode(train_indexer=True)

    def loss(params, tokens):
        return loss_and_routing(
            MODEL, params, {"tokens": tokens}, Context(dtype=dtype, sparse=train_indexer)
        )[0]

    jaxpr = jax.make_jaxpr(jax.grad(loss))(
        abstract_params(MODEL), jax.ShapeDtypeStruct((2, 72), jnp.int32)
    ).jaxpr
    products = [
        one
        for one in equations(jaxpr)
        if one.primitive.name in ("dot_general", "ragged_dot_general")
    ]
    single = [
        one
        for one in products
        if all(operand.aval.dtype == jnp.float32 for operand in one.invars[:2])
    ]
    assert len(single) > 20 and (dtype == jnp.float32) == (len(single) == len(products))
    for one in single:
        assert one.params["precision"] in (
            jax.lax.Precision.HIGHEST,
            (jax.lax.Precision.HIGHEST,) * 2,
        ), one


def test_no_array_is_quadratic_in_the_length(monkeypatch):
    """No array has two axes that grow with the sequence, or more than a few rows' activations."""
    monkeypatch.setattr(attention, "CHUNK_BYTES", 2**16)
    seq = 1432  # no other size of the model, and neither is a quarter of it
    tokens = jax.ShapeDtypeStruct((2, seq), jnp.int32)

    def loss(params, tokens):
        return loss_and_routing(MODEL, params, {"tokens": tokens}, Context(remat="layer"))[0]

    found = set(shapes(jax.make_jaxpr(jax.grad(loss))(abstract_params(MODEL), tokens).jaxpr))
    assert len(found) > 100 and any(seq in shape for shape in found)
    for shape in found:
        assert sum(size >= seq // 4 for size in shape) <= 1, shape
        assert np.prod(shape, dtype=float) <= 2 * seq * 19 * 16, (
            shape
        )  # 19 Sinkhorn steps of 4 x 4 keep the most


def test_remat_changes_nothing(params):
    batch = {"tokens": jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 40)), jnp.int32)}

    def step(remat):
        return jax.jit(
            jax.value_and_grad(
                lambda params: loss_and_routing(MODEL, params, batch, Context(remat=remat))[0]
            )
        )(params)

    (loss, grads), (loss_again, grads_again) = step(False), step(True)
    assert float(loss) == pytest.approx(float(loss_again), rel=1e-6)
    for a, b in zip(
        *(map(np.asarray, jax.tree.leaves(tree)) for tree in (grads, grads_again)), strict=True
    ):
        # The same sums are fused differently.
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) + 1e-8 * b.size**0.5


def test_bfloat16_stays_near_float32(params):
    """8 bits of mantissa are 0.4% an operation, so quantiles count.

    Routers may choose other experts for a few tokens.
    """
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 40)), jnp.int32)
    exact = forward(MODEL, params, tokens, dtype=jnp.float32)
    rough = forward(MODEL, params, tokens, dtype=jnp.bfloat16)
    assert rough.logits.dtype == jnp.float32
    error = jnp.linalg.norm(rough.logits - exact.logits, axis=-1) / jnp.linalg.norm(
        exact.logits, axis=-1
    )
    assert 1e-4 < float(jnp.median(error)) < 0.05


@pytest.mark.parametrize("packed", [False, True])
def test_a_cut_sequence_has_the_logits_of_a_whole_one(params, packed):
    """Windows of 4, 8 and 128 rows straddle devices of 17 rows, some of them several."""
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(0, 96, (2, 136)), jnp.int32)
    segments = (
        jnp.asarray(np.sort(rng.integers(0, 3, (2, 136)), axis=1)[:, ::-1], jnp.int32)
        if packed
        else None
    )
    whole = forward(MODEL, params, tokens, segments)
    sizes = parse_mesh("context=8")
    with jax.set_mesh(make_mesh(sizes)):
        cut = forward(MODEL, params, tokens, segments, rules=layout_for("cp_ep", sizes))
        with pytest.raises(ValueError, match="rows of 135; must divide by 8"):
            forward(MODEL, params, tokens[:, :135], rules=layout_for("cp_ep", sizes))
    np.testing.assert_allclose(cut.logits, whole.logits, atol=2e-5)
    np.testing.assert_allclose(cut.mtp_logits[:, :-1], whole.mtp_logits[:, :-1], atol=2e-5)
