"""The model is the report's equations, and packed rows are their documents alone.

The judge is the plain NumPy restatement.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import loss as reference_loss
from reference import transformer
from reference.weights import random_weights
from trees import small_config

import v4jax.model.transformer
from v4jax.checkpoint.names import from_official
from v4jax.context import Context
from v4jax.kernels import attention, index_scores
from v4jax.kernels.choice import kernels_from
from v4jax.model.mtp import Drafter
from v4jax.train.loss import loss_and_routing

PATTERNS = {
    "flash": dict(
        compress_ratios=(0, 0, 4, 128, 4, 0),
        num_hidden_layers=5,
        num_hash_layers=3,
        index_n_heads=8,
    ),
    "pro": dict(
        compress_ratios=(128, 128, 4, 128, 0),
        num_hidden_layers=4,
        num_hash_layers=2,
        index_n_heads=8,
        rope_scaling=None,
    ),
}


@functools.cache
def model(name):
    cfg = small_config(**PATTERNS[name])
    weights = random_weights(cfg, 0)
    return cfg, weights, jax.tree.map(jnp.asarray, from_official(cfg, weights))


def tokens_of(cfg, shape, seed=0):
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, shape)


@pytest.mark.parametrize(
    ("name", "seq"),
    [(name, seq) for name in PATTERNS for seq in (1, 5, 131)]
    + [pytest.param("pro", 300, marks=pytest.mark.slow)]
    + [
        pytest.param(*one, marks=pytest.mark.long)
        for one in (("flash", 300), ("flash", 700), ("pro", 700))
    ],
)
def test_logits_are_those_of_the_equations(name, seq):
    cfg, weights, params = model(name)
    tokens = tokens_of(cfg, (2, seq))
    expected = transformer.forward(cfg, weights, tokens)
    got = v4jax.forward(cfg, params, jnp.asarray(tokens))
    # Issue 2 asks for 2e-4. float32 against float64 at logits of order 1 leaves about 1e-5.
    np.testing.assert_allclose(got.logits, expected.logits, atol=5e-5)
    np.testing.assert_allclose(got.mtp_logits[:, :-1], expected.mtp_logits[:, :-1], atol=5e-5)
    loads = [np.asarray(load) for load in in_order(cfg, got.aux)]
    for load, want in zip(loads, expected.load, strict=True):
        np.testing.assert_array_equal(load, want)


def in_order(cfg, aux):
    """Loads of every layer, MTP last."""
    for group in cfg.layer_groups:
        for r in range(group.repeats):
            for i in range(len(group.kinds)):
                yield aux[group.name][f"block_{i}"].load_E[r]
    yield aux["mtp"]["block"].load_E


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(cfg, params, batch):
    (_, aux), grads = jax.value_and_grad(lambda p: loss_and_routing(cfg, p, batch), has_aux=True)(
        params
    )
    return aux[0], aux[1], grads


def test_packed_documents_equal_documents_alone():
    """Logits, loss, loads and all gradients agree.

    Documents are shorter than a CSA window, unaligned, and longer than an HCA window.
    """
    cfg = small_config(compress_ratios=(0, 4, 128, 0), num_hidden_layers=3, num_hash_layers=1)
    weights = random_weights(cfg, 1)
    params = jax.tree.map(jnp.asarray, from_official(cfg, weights))
    lengths = [3, 137, 30, 6]
    row = tokens_of(cfg, (1, 180), 2)
    segments = np.repeat([1, 2, 3, 4, 0], [*lengths, 180 - sum(lengths)])[None].astype(np.int32)
    starts = np.cumsum([0, *lengths])[:-1]
    # A document alone is a row padded on the right: nothing after it can reach it. Rows of padding
    # make the packed batch as large, so that both are one program.
    alone = np.zeros((4, 180), np.int64)
    alone_segments = np.zeros((4, 180), np.int32)
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        alone[i, :length], alone_segments[i, :length] = row[0, start : start + length], 1
    # Rows of padding make the packed batch as large, and so both are one program.
    packed, separate = (
        {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(ids)}
        for tokens, ids in (
            (np.pad(row, ((0, 3), (0, 0))), np.pad(segments, ((0, 3), (0, 0)))),
            (alone, alone_segments),
        )
    )

    expected = transformer.forward(cfg, weights, row, segments)
    got = v4jax.forward(cfg, params, jnp.asarray(row), jnp.asarray(segments))
    real = segments[0] > 0
    np.testing.assert_allclose(np.asarray(got.logits)[0, real], expected.logits[0, real], atol=5e-5)
    inner = real & np.append(
        segments[0, 1:] == segments[0, :-1], False
    )  # MTP means nothing at a document's last token
    np.testing.assert_allclose(
        np.asarray(got.mtp_logits)[0, inner], expected.mtp_logits[0, inner], atol=5e-5
    )

    metrics, routing, grads = loss_and_gradient(cfg, params, packed)
    other_metrics, other_routing, other_grads = loss_and_gradient(cfg, params, separate)
    want = reference_loss.loss(cfg, expected, row, segments)
    assert float(metrics["nll"]) == pytest.approx(want.next_token, rel=1e-5)
    assert float(metrics["mtp_nll"]) == pytest.approx(want.mtp, rel=1e-5)
    for name in metrics:
        assert float(metrics[name]) == pytest.approx(float(other_metrics[name]), rel=1e-5), name
    for load, other in zip(in_order(cfg, routing), in_order(cfg, other_routing), strict=True):
        np.testing.assert_array_equal(load, other)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(other_grads), strict=True
    ):
        # Sums run in another order: relative to the tensor's norm, and 1e-7 absolute for gradients
        # that are zero but for rounding.
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(b) + 1e-7, jax.tree_util.keystr(path)


FORMS = {
    "whole": (2**26, 10**9, 4096),
    "chunked": (2**12, 10**9, 4096),
    "gathered": (2**12, 1, 4096),
    "in blocks": (2**12, 1, 8),
    "reference": (2**26, 10**9, 4096),
}
"""CHUNK_BYTES, GATHER_FROM, SCORE_BLOCK"""


@functools.cache
def loss_in_form(name):
    """(loss, gradients) of two CSA layers and MTP."""
    cfg = small_config(compress_ratios=(4, 4, 0), num_hidden_layers=2, num_hash_layers=0)
    params = jax.tree.map(jnp.asarray, from_official(cfg, random_weights(cfg, 2)))
    batch = {"tokens": jnp.asarray(tokens_of(cfg, (2, 140), 3))}
    chunk_bytes, gather_from, score_block = FORMS[name]
    ctx = Context(kernels=kernels_from("reference" if name == "reference" else ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(attention, "GATHER_FROM", gather_from)
        patch.setattr(index_scores, "SCORE_BLOCK", score_block)
        return jax.jit(jax.value_and_grad(lambda p: loss_and_routing(cfg, p, batch, ctx)[0]))(
            params
        )


@pytest.mark.parametrize(
    "form", ["chunked", pytest.param("gathered", marks=pytest.mark.slow), "in blocks", "reference"]
)
def test_chunks_gathered_entries_and_kernels_change_nothing(form):
    """The same loss and gradients with queries in small chunks, CSA by gathering, not masking.

    Index scores are those of the entries that a chunk sees. "reference" takes no fast way at all.
    """
    (value, grads), (other_value, other_grads) = map(loss_in_form, ("whole", form))
    assert float(other_value) == pytest.approx(float(value), rel=1e-6)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(other_grads), jax.tree.leaves(grads), strict=True
    ):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) + 1e-7, jax.tree_util.keystr(path)


@pytest.mark.parametrize("remat", [pytest.param("none", marks=pytest.mark.long), "layer"])
def test_gradients_of_mtp_are_whole_before_the_layers_go_on(monkeypatch, remat):
    """A barrier waits for all of MTP's gradients and for what flows back into the layers.

    Nothing else differs from the module's own gradient.
    """
    cfg = small_config(compress_ratios=(4, 4, 0), num_hidden_layers=2, num_hash_layers=0)
    params = jax.tree.map(jnp.asarray, from_official(cfg, random_weights(cfg, 2)))
    batch = {"tokens": jnp.asarray(tokens_of(cfg, (2, 20), 3))}

    def grad(p):
        return jax.grad(lambda p: loss_and_routing(cfg, p, batch, Context(remat=remat))[0])(p)

    def shapes(leaves):
        return collections.Counter(leaf.shape for leaf in leaves)

    needed = shapes(jax.tree.leaves(params["mtp"])) + collections.Counter(
        [(2, 20, cfg.hc_mult, cfg.hidden_size)]
    )
    barriers = [
        eqn
        for eqn in jax.make_jaxpr(grad)(params).eqns
        if eqn.primitive.name == "optimization_barrier"
    ]
    assert any(needed <= shapes(var.aval for var in eqn.outvars) for eqn in barriers)
    got = jax.jit(grad)(params)

    def plain(ctx, cfg, variables, key, *inputs):
        return Drafter(ctx, cfg).apply(variables, *inputs), None

    monkeypatch.setattr(v4jax.model.transformer, "run_mtp", plain)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got),
        jax.tree.leaves(jax.jit(lambda p: grad(p))(params)),
        strict=True,
    ):
        # Fusions differ, so rounding does: relative to the tensor's norm.
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) + 1e-7, jax.tree_util.keystr(path)
