"""The indexer's loss is the equation, teaches the indexer alone, and is the same on any mesh.

The judge is the plain restatement.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from reference import attention as reference
from reference import hyper
from reference.transformer import documents
from reference.weights import random_weights
from test_mesh import MODEL, SMALL, batch_of
from test_promises import shapes
from trees import small_config

from sharding.mesh import make_mesh, parse_mesh
from sharding.rules import AxisRules, layout_for
from v4jax.checkpoint.names import from_official
from v4jax.context import Context, SparseMode
from v4jax.kernels import attention
from v4jax.parameter_tree import abstract_params
from v4jax.train.loss import loss_and_routing

ONE = small_config(
    num_hidden_layers=1,
    num_hash_layers=0,
    num_nextn_predict_layers=0,
    compress_ratios=(4,),
    index_n_heads=8,
    vocab_size=96,
)
WEIGHTS = random_weights(ONE, 0)
PARAMS = jax.tree.map(jnp.asarray, from_official(ONE, WEIGHTS))
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 70))
SEGMENTS = np.repeat([[1, 2, 3, 0]], [3, 40, 20, 7], axis=1).repeat(2, 0).astype(np.int32)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
long = functools.partial(pytest.param, marks=pytest.mark.long)


@functools.partial(jax.jit, static_argnums=1)
def metrics_of(params, sparse, batch):
    return loss_and_routing(ONE, params, batch, Context(sparse=sparse))[1][0]


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(cfg, params, batch, sparse):
    """(metrics, gradients of the training objective)."""
    (_, aux), grads = jax.value_and_grad(
        lambda p: loss_and_routing(cfg, p, batch, Context(sparse=sparse)), has_aux=True
    )(params)
    return aux[0], grads


def expected_loss(tokens_BS, segments_BS, dense):
    """The reference's mean over queries of the one CSA layer, each document alone."""
    weights = {name: np.asarray(w, np.float64) for name, w in WEIGHTS.items()}
    found = []
    for tokens_S, segments_S in zip(tokens_BS, segments_BS, strict=True):
        for start, stop in documents(segments_S):
            if segments_S[start] == 0:
                continue
            streams = np.repeat(
                weights["embed.weight"][tokens_S[start:stop]][:, None], ONE.hc_mult, axis=1
            )
            x_SD = hyper.collapse(
                hyper.mix(ONE, weights, "layers.0.hc_attn", streams).pre_SX, streams
            )
            x_SD = hyper.rms_norm(x_SD, ONE.rms_norm_eps, weights["layers.0.attn_norm.weight"])
            found.append(reference.index_loss(ONE, weights, "layers.0.attn", x_SD, dense))
    return np.concatenate(found).mean(axis=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", ["dense", "sparse", "gathered"])
def test_the_loss_is_the_equation(form, packed, monkeypatch):
    """Chunks are small, so that the last one is filled up with rows that must not count."""
    monkeypatch.setattr(attention, "CHUNK_BYTES", 2**13)
    monkeypatch.setattr(attention, "GATHER_FROM", 1 if form == "gathered" else 10**9)
    metrics_of.clear_cache()
    segments = SEGMENTS if packed else np.ones_like(SEGMENTS)
    batch = {"tokens": jnp.asarray(TOKENS)} | (
        {"segment_ids": jnp.asarray(segments)} if packed else {}
    )
    metrics = metrics_of(PARAMS, SparseMode(dense=form == "dense", train_indexer=True), batch)
    kl, uniform = expected_loss(TOKENS, segments, form == "dense")
    assert float(metrics["index_kl"]) == pytest.approx(kl, rel=2e-5)  # float32 against float64
    assert float(metrics["index_kl_uniform"]) == pytest.approx(uniform, rel=2e-5)
    assert float(metrics["index_captured"]) == pytest.approx(1 - kl / uniform, abs=2e-5)


def test_where_everything_is_chosen_both_losses_agree():
    """Rows of 4 * topk tokens have topk entries, so all are chosen."""
    batch = {"tokens": jnp.asarray(TOKENS[:, :16])}
    run.clear_cache()
    dense, sparse = (
        run(ONE, PARAMS, batch, SparseMode(dense=dense, train_indexer=True))
        for dense in (True, False)
    )
    for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(sparse), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dense", [False, True])
def test_only_the_indexer_learns_from_it(dense):
    batch = {"tokens": jnp.asarray(TOKENS), "segment_ids": jnp.asarray(SEGMENTS)}
    run.clear_cache()
    (plain_metrics, plain), (metrics, taught) = (
        run(ONE, PARAMS, batch, SparseMode(dense=dense, train_indexer=train_indexer))
        for train_indexer in (False, True)
    )
    assert float(metrics["nll"]) == pytest.approx(float(plain_metrics["nll"]), rel=1e-6)
    moved = 0
    for path, a in flatten_dict(taught).items():
        b = flatten_dict(plain)[path]
        if "indexer" in path:
            assert not np.asarray(b).any()
            moved += bool(np.asarray(a).any())
        else:  # the same sums, fused differently
            assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) + 1e-8, path
    assert moved == 6


def test_no_array_is_quadratic_in_the_length(monkeypatch):
    monkeypatch.setattr(attention, "CHUNK_BYTES", 2**16)
    seq, tokens = 1432, jax.ShapeDtypeStruct((2, 1432), jnp.int32)
    for dense in (False, True):
        ctx = Context(sparse=SparseMode(dense=dense, train_indexer=True), remat="layer")

        def loss(params, tokens, ctx=ctx):
            return loss_and_routing(SMALL, params, {"tokens": tokens}, ctx)[0]

        found = set(shapes(jax.make_jaxpr(jax.grad(loss))(abstract_params(SMALL), tokens).jaxpr))
        assert any(seq in shape for shape in found)
        for shape in found:
            assert sum(size >= seq // 4 for size in shape) <= 1, shape


@pytest.mark.parametrize(
    "dense, mesh, layout",
    [
        slow(False, "fsdp=2,context=2,tensor=2", "full"),
        long(False, "context=2,expert=2,tensor=2", "pod"),
        long(True, "fsdp=2,context=2,tensor=2", "full"),
        slow(True, "context=2,expert=2,tensor=2", "pod"),
    ],
)
def test_a_mesh_has_the_loss_and_gradients_of_one_device(dense, mesh, layout):
    """Heads are added across devices before the mass is normalised.

    The mean is over the queries of all devices.
    """
    params = jax.tree.map(jnp.asarray, from_official(MODEL, random_weights(MODEL, 0)))
    batch = jax.tree.map(jnp.asarray, batch_of())

    def value(rules):
        return jax.jit(
            jax.value_and_grad(
                lambda p: loss_and_routing(
                    MODEL,
                    p,
                    batch,
                    Context(rules=rules, sparse=SparseMode(dense=dense, train_indexer=True)),
                )[::-1][0][0]["index_kl"]
            )
        )

    kl, grads = value(AxisRules())(params)
    sizes = parse_mesh(mesh)
    with jax.set_mesh(make_mesh(sizes)):
        cut_kl, cut = value(layout_for(layout, sizes))(params)
    assert float(cut_kl) == pytest.approx(float(kl), rel=1e-5)
    for path, a in flatten_dict(grads).items():
        if "indexer" in path:
            assert np.linalg.norm(flatten_dict(cut)[path] - a) <= 1e-4 * np.linalg.norm(a) + 1e-8, (
                path
            )
            assert np.asarray(a).any(), path
