"""Values and gradients stay right where something is zero, tiny or huge.

Such as matrices at rest, empty batches, scores next to nothing, squares that float32 cannot hold.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from reference import muon as reference
from trees import small_config

from sharding.matrices import on_whole_matrices
from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import AxisRules
from v4jax.context import Context, SparseMode
from v4jax.functional import init_params
from v4jax.generate.sampling import Sampling, choose_token
from v4jax.kernels.norm import rms_norm
from v4jax.kernels.sinkhorn import sinkhorn
from v4jax.model.balance import balance_loss, expert_share
from v4jax.model.hyper import mixing_logits
from v4jax.model.indexer import index_loss
from v4jax.model.router import gate_weights, router_scores
from v4jax.model.segments import Segments
from v4jax.quant import fake
from v4jax.train.loss import loss_and_routing
from v4jax.train.muon import (
    clip_apart,
    global_norm,
    newton_schulz,
    optimizer,
    scale_by_adam,
    scale_by_muon,
)
from v4jax.train.stability import LossHistory, StabilityConfig, spike
from v4jax.train.watch import rms_by_group

LEAST, LARGEST = (float(value) for value in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


# ---- optimizers ----------------------------------------------------------------------------------


def rms(x) -> np.ndarray:
    return np.sqrt(np.mean(np.square(np.asarray(x, np.float64)), axis=(-2, -1)))


@pytest.mark.parametrize("mu, steps", [(0.5, 200), (0.95, 2000)])
def test_a_matrix_without_gradients_moves_on_and_comes_to_rest(mu, steps):
    """An expert without tokens is such a matrix: its momentum decays until float32 underflows."""
    muon = scale_by_muon(mu)
    g = 1e-4 * jax.random.normal(jax.random.key(0), (16, 32))
    _, state = muon.update(g, muon.init(g))

    def rest(state, _):
        out, state = muon.update(jnp.zeros_like(g), state)
        return state, out

    _, outs = jax.jit(lambda state: jax.lax.scan(rest, state, length=steps))(state)
    outs = np.asarray(outs)
    assert np.isfinite(outs).all() and not outs[-1].any()
    # Steps until the least entries become subnormal.
    normal = int(math.log(LEAST / 1e-9) / math.log(mu))
    np.testing.assert_allclose(rms(outs[:normal]), 0.18, rtol=0.03)
    np.testing.assert_allclose(
        outs[:normal], np.broadcast_to(outs[0], outs[:normal].shape), atol=1e-4
    )


def test_the_size_of_a_matrix_does_not_matter():
    """Sizes go from the least normal number to the largest; neighbours in a stack play no part."""
    signs = np.where(np.random.default_rng(0).normal(size=(16, 24)) > 0, 1, -1).astype(np.float32)
    mixed = np.random.default_rng(1).normal(size=(16, 24)).astype(np.float32)
    mixed /= np.abs(mixed).max()
    sizes = [LEAST, 2e-38, 1e-30, 1e-20, 1.0, 1e18, 1e25, 1e30, LARGEST]
    even = [signs * np.float32(size) for size in sizes]
    stack = np.stack(
        [np.zeros_like(signs), *even, *(mixed * np.float32(size) for size in sizes[2:])]
    )
    got = np.asarray(jax.jit(newton_schulz)(stack))
    assert not got[0].any()
    for matrix, one in ((signs, got[1:10]), (mixed, got[10:])):
        want = reference.hybrid_newton_schulz(matrix)
        np.testing.assert_allclose(one, np.broadcast_to(want, one.shape), atol=2e-6)
    # A subnormal number, which XLA may take for 0.
    assert np.isfinite(newton_schulz(jnp.full((3, 4), 1e-40))).all()


def test_matrices_at_rest_beside_others_on_a_mesh():
    """One matrix is zero, one zero except on one device, one tiny, one huge."""
    mesh, spec = (
        make_mesh(parse_mesh("fsdp=2,expert=2,tensor=2")),
        P(None, "expert", "fsdp", "tensor"),
    )
    x = np.random.default_rng(0).normal(size=(2, 4, 16, 24)).astype(np.float32)
    x[0, 0] = 0
    x[0, 1, 8:] = 0
    x[0, 2] *= np.float32(1e-30)
    x[1, 3] *= np.float32(1e30)
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, spec)

        def one(x):
            return on_whole_matrices(newton_schulz, [x], [spec])[0]

        run = jax.jit(one, in_shardings=place, out_shardings=place)
        got = np.asarray(run(jax.device_put(x, place)))
    assert not got[0, 0].any()
    for index in np.ndindex(2, 4):
        np.testing.assert_allclose(got[index], reference.hybrid_newton_schulz(x[index]), atol=2e-5)


@pytest.mark.parametrize(
    "size", [0, 1e-30, 1e-25, 1e-21, 1e-20, 1e-19, 4e-19, 1e-18, 1e-15, 1.0, 1e15]
)
def test_adam_never_steps_further_than_it_can(size):
    """Three equal gradients, then none. Squares underflow in the middle of these sizes."""
    adam, state, w, m, v = scale_by_adam(), None, 0.0, 0.0, 0.0
    update, state = jax.jit(adam.update), adam.init(jnp.zeros(()))
    for step in range(1, 8):
        g = size if step <= 3 else 0.0
        got, state = update(jnp.float32(g), state)
        before = w
        w, m, v = reference.adamw(w, m, v, g, step, lr=1.0, weight_decay=0.0)
        want = before - w
        if not 1e-22 < size < 1e-18:
            assert float(got) == pytest.approx(want, rel=0.02, abs=1e-30)
        assert abs(float(got)) <= 1.17 and (got == 0) == (want == 0)


def test_the_optimizer_state_is_that_of_optax():
    """Runs from before Adam's step was bounded still resume."""
    params = {"embed": {"weight": jnp.ones((2, 3))}}
    state = optimizer(lambda step: 0.1).init(params).inner_states["adamw"].inner_state
    assert jax.tree.structure(state) == jax.tree.structure(
        optax.adamw(lambda step: 0.1).init(params)
    )


@pytest.mark.parametrize("size", [0, 1e-30, 1e-10, 1.0, 1e18, 1e25, 1e36])
def test_gradients_are_clipped_whatever_their_size(size):
    main, index = jnp.full((3, 4), size, jnp.float32), jnp.full(9, size, jnp.float32)
    attention = {"wq_a": main, "indexer": {"wq_b": index}}
    grads = {"layers_2_4": {"block_0": {"attn": attention}}}
    clip = clip_apart(2.0)
    clipped, _ = jax.jit(clip.update)(grads, clip.init(grads))
    clipped = clipped["layers_2_4"]["block_0"]["attn"]
    for given, got in ((main, clipped["wq_a"]), (index, clipped["indexer"]["wq_b"])):
        want = min(size, 2 / math.sqrt(given.size))
        np.testing.assert_allclose(got, np.full(given.shape, want), rtol=1e-6)
    if size != 1e-30:  # its square is 0, and so is the norm that is shown
        assert float(global_norm(grads)) == pytest.approx(size * math.sqrt(21), rel=1e-6)
        assert float(rms_by_group({"embed": {"weight": main}})["embed"]) == pytest.approx(
            size, rel=1e-6
        )


def test_a_gradient_that_is_not_finite_has_no_finite_norm():
    for bad in (jnp.inf, -jnp.inf, jnp.nan):
        assert not np.isfinite(global_norm([jnp.ones(3), jnp.array([1.0, bad])]))
    assert np.isinf(global_norm([jnp.full(4, LARGEST)]))  # twice the largest number
    assert global_norm([]) == 0


def test_norms_that_scatter_from_nothing_to_the_largest_are_compared():
    """The limit is 1e30 to a high power, which no float holds."""
    norms = tuple(itertools.islice(itertools.cycle((0.0, 1e30)), 32))
    history = LossHistory(losses=(1.0,) * 32, grad_norms=norms)
    assert spike(StabilityConfig(rollbacks=1), history, 1.0, 3e38) is None


# ---- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("logit", [-30.0, -80.0, -90.0, -120.0, -150.0])
def test_gates_of_experts_that_all_score_next_to_nothing(logit):
    """Weights are those of exp(logit / 2), with the gradient w_i (delta_ij - w_j) / 2.

    The same holds for the shares of the balance loss.
    """
    logits = jnp.asarray([[[logit, logit - 2, logit - 3, logit - 1]]])
    index, scale = jnp.asarray([[[0, 1]]]), 1.5
    eye = jnp.eye(4)
    got, pull = jax.vjp(
        lambda logits: gate_weights(router_scores(logits, eye), index, scale), logits
    )
    share = np.exp([0, -1]) / np.exp([0, -1]).sum()
    np.testing.assert_allclose(got[0, 0], scale * share, rtol=1e-5)
    (slope,) = pull(jnp.asarray([[[1.0, 0.0]]]))
    want = scale / 2 * share[0] * np.array([share[1], -share[1], 0, 0])
    np.testing.assert_allclose(slope[0, 0], want, rtol=1e-4, atol=1e-7)

    segments = Segments(None, None, None, None, None, {})
    chosen = expert_share(AxisRules(), index, segments, 4)
    value, slope = jax.value_and_grad(
        lambda logits: balance_loss(router_scores(logits, eye), chosen, segments)
    )(logits)
    share = np.exp([0, -1, -1.5, -0.5]) / np.exp([0, -1, -1.5, -0.5]).sum()
    # f is 4/2 for both experts of the only token.
    assert float(value) == pytest.approx(2 * share[:2].sum(), rel=1e-5)
    want = share / 2 * (np.array([2, 2, 0, 0]) - 2 * share[:2].sum())
    np.testing.assert_allclose(slope[0, 0], want, rtol=1e-4, atol=1e-7)


def test_gates_of_experts_without_any_score_are_equal():
    logits = jnp.full((1, 1, 4), -1e4)
    index = jnp.asarray([[[0, 3]]])

    def weight(x):
        return gate_weights(router_scores(x, jnp.eye(4)), index, 1.0)

    got, slope = jax.value_and_grad(lambda logits: weight(logits)[0, 0, 0])(logits)
    assert float(got) == 0.5 and not np.asarray(slope).any()


@pytest.mark.parametrize("eps", [1e-6, 1e-20])
def test_norms_of_rows_of_zeros(eps):
    """The value is 0; the gradient is that of a row of RMS 1, whatever eps."""
    ct, weight = jnp.arange(1.0, 5), jnp.asarray([1.0, -2, 0.5, 3])
    got, pull = jax.vjp(lambda x, weight: rms_norm(x, eps, weight), jnp.zeros((1, 4)), weight)
    slope, weight_slope = pull(ct[None])
    assert not np.asarray(got).any() and not np.asarray(weight_slope).any()
    np.testing.assert_allclose(slope[0], ct * weight, rtol=1e-5)
    fn = jax.random.normal(jax.random.key(0), (4, 3))
    got, pull = jax.vjp(lambda x: mixing_logits(x, fn, eps), jnp.zeros((1, 1, 2, 2)))
    assert not np.asarray(got).any()
    (slope,) = pull(jnp.ones((1, 1, 3)))
    np.testing.assert_allclose(slope.reshape(-1), fn.sum(1), rtol=1e-5)


@pytest.mark.parametrize("eps", [1e-6, 1e-20])
def test_norms_of_all_other_rows_have_the_gradient_of_the_formula(eps):
    """Rows of ordinary and of small numbers, beside one of zeros."""
    x = jax.random.normal(jax.random.key(0), (3, 8)) * jnp.asarray([[1.0], [1e-6], [0.0]])
    ct = jax.random.normal(jax.random.key(1), (3, 8))

    def formula(x):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)

    values, pull = zip(*(jax.vjp(f, x) for f in (lambda x: rms_norm(x, eps), formula)), strict=True)
    np.testing.assert_array_equal(*values)
    np.testing.assert_array_equal(pull[0](ct)[0][:2], pull[1](ct)[0][:2])


@pytest.mark.parametrize("name", ["rms_norm_eps", "hc_eps"])
def test_an_eps_whose_gradients_overflow_is_refused(name):
    assert getattr(small_config(**{name: 1e-20}), name) == 1e-20
    with pytest.raises(ValueError, match=f"{name}: got 1e-30; must be at least 1e-24"):
        small_config(**{name: 1e-30})


def test_mixing_matrices_of_the_furthest_logits():
    """All mass is on one target, as far as float32 goes: columns sum to 1, gradients are finite."""
    logits = jnp.full((4, 4, 1), -1e30).at[:, 0].set(1e30)
    comb, pull = jax.vjp(lambda logits: sinkhorn(logits, 20, 1e-6), logits)
    np.testing.assert_allclose(comb.sum(0), 1, atol=1e-5)
    assert np.isfinite(pull(jnp.arange(16.0).reshape(4, 4, 1))[0]).all()


@pytest.mark.parametrize("mass", [0.0, 1e-45, 1e-38, 1.0])
def test_the_indexers_loss_of_queries_that_see_nothing_is_0(mass):
    seen = jnp.zeros((1, 2, 3), bool)
    given, real = jnp.where(seen, mass, 0.0), jnp.ones(2, bool)
    values, pull = jax.vjp(lambda score: index_loss(given, score, seen, real), jnp.ones((1, 2, 3)))
    assert tuple(map(float, values)) == (0, 0, 0)
    assert not np.asarray(pull(jax.tree.map(jnp.ones_like, values))[0]).any()


@pytest.fixture(scope="module")
def gradients():
    """(params, batch) -> (loss, metrics, gradients) of a small model; also params and a batch.

    It has the eps of a newer release, and its indexer learns. It compiles once.
    """
    cfg = small_config(
        vocab_size=64,
        num_hidden_layers=2,
        compress_ratios=(0, 4, 0),
        num_hash_layers=1,
        hidden_size=16,
        moe_intermediate_size=16,
        n_routed_experts=4,
        rms_norm_eps=1e-20,
    )

    @jax.jit
    def run(params, batch):
        def value(params):
            ctx = Context(sparse=SparseMode(train_indexer=True))
            return loss_and_routing(cfg, params, batch, ctx)

        (loss, (metrics, _)), grads = jax.value_and_grad(value, has_aux=True)(params)
        return loss, metrics, grads

    params = init_params(cfg, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 64)
    return (
        run,
        params,
        {
            "tokens": tokens,
            "segment_ids": jnp.ones_like(tokens),
            "loss_mask": jnp.ones_like(tokens),
        },
    )


@pytest.mark.parametrize("empty", ["segment_ids", "loss_mask"])
def test_a_batch_without_a_token_to_learn_teaches_the_main_model_nothing(gradients, empty):
    """The rows are all padding, or conversations whose answers were cut off.

    Balance and indexer still count tokens that are not padding.
    """
    run, params, batch = gradients
    loss, metrics, grads = run(params, batch | {empty: jnp.zeros_like(batch[empty])})
    assert float(metrics["nll"]) == float(metrics["mtp_nll"]) == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert not np.asarray(grads["head"]["weight"]).any()
    if empty == "segment_ids":
        assert float(loss) == 0 and not any(
            np.asarray(leaf).any() for leaf in jax.tree.leaves(grads)
        )


def test_a_model_of_zeros_guesses_blindly(gradients):
    """Norms, gates and softmaxes of nothing give the loss of equal chances and finite gradients."""
    run, params, batch = gradients
    zeros = jax.tree.map(jnp.zeros_like, params) | {"router": params["router"]}
    _, metrics, grads = run(zeros, batch)
    assert float(metrics["nll"]) == pytest.approx(math.log(64), rel=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


# ---- low precision, sampling ---------------------------------------------------------------------


def test_blocks_of_zeros_round_to_zeros_and_what_is_not_finite_stays_so():
    for rounded in (fake.fp8_weight, fake.mxfp4_weight, fake.fp8_input):
        got, pull = jax.vjp(rounded, jnp.zeros((128, 128)))
        assert not np.asarray(got).any()
        np.testing.assert_array_equal(pull(jnp.ones((128, 128)))[0], 1)
        for bad in (jnp.nan, jnp.inf, -jnp.inf):
            assert not np.isfinite(rounded(jnp.ones((128, 128)).at[5, 7].set(bad))[5, 7])


def test_sampling_from_what_filters_leave_of_impossible_tokens():
    """The only possible token is taken, with probability 1.

    If none is possible its probability is NaN, which decoding refuses.
    """
    logits = jnp.full((2, 6), -jnp.inf).at[0, 4].set(-1e30)
    sampling = Sampling(temperature=1.0, top_k=3, top_p=0.9, min_p=0.1)
    token, score = choose_token(sampling, logits, jnp.zeros(2, jnp.uint32), jnp.zeros(2, jnp.int32))
    assert int(token[0]) == 4 and float(score[0]) == 0
    assert np.isnan(score[1])
