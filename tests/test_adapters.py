"""Low-rank pairs: merged and unmerged agree, matrices get no gradient, targets say what has one.

A pair's gradients are checked against those of whole matrices: where G is the gradient of
W + a b, that of a is G b^T and that of b is a^T G.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from reference.weights import random_weights
from test_mesh import SMALL
from trees import close

from v4jax.adapters.config import Lora, adapted_paths, matches, target_name
from v4jax.adapters.tree import abstract_adapters, adapter_axes, init_adapters, merged, times
from v4jax.checkpoint.names import from_official
from v4jax.context import Context, SparseMode
from v4jax.functional import apply
from v4jax.model.transformer import project_logits
from v4jax.parameter_tree import abstract_params, leaves
from v4jax.train.loss import loss_and_routing, loss_of
from v4jax.train.losses.weights import LossWeights

MODEL = SMALL.replace(num_hidden_layers=2, compress_ratios=(4, 4, 0), num_hash_layers=1)
RANK = 32
"""The most rows that a matrix of MODEL has: an identity fits into a."""
LORA = Lora(rank=RANK, targets=("*", "indexer.*"))
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 24)).astype(np.int32)


def with_logits(params):
    """(loss, logits of both heads), the indexer's loss among the terms."""
    ctx = Context(sparse=SparseMode(train_indexer=True))
    hidden = apply(MODEL, params, TOKENS, ctx=ctx)
    loss, _ = loss_of(hidden, {"tokens": TOKENS}, ctx, list(LossWeights().terms()))
    outputs = hidden.x_BSD, hidden.mtp_x_BSD
    return loss, [project_logits(ctx, x_BSD, hidden.head_DV) for x_BSD in outputs]


@functools.cache
def weights():
    return from_official(MODEL, random_weights(MODEL, 0))


@functools.cache
def whole():
    """params -> ((loss, logits), gradients of all weights)."""
    return jax.jit(jax.value_and_grad(with_logits, has_aux=True))


@functools.cache
def adapted():
    """pairs -> ((loss, logits), gradients of pairs)."""

    def run(pairs, params):
        return with_logits(params | {"lora": pairs})

    return functools.partial(jax.jit(jax.value_and_grad(run, has_aux=True)), params=weights())


def fresh(noise: float = 0.0):
    pairs = init_adapters(MODEL, LORA, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(pairs))))
    return jax.tree.map(lambda x: x + noise * jax.random.normal(next(keys), x.shape), pairs)


def matmul(a, b):
    return jnp.matmul(a, b, precision="highest")


@pytest.mark.parametrize("alpha", [0.0, 16.0])
def test_alpha_0_and_fresh_pairs_change_no_logit(alpha):
    lora = Lora(rank=RANK, alpha=alpha, targets=LORA.targets)
    pairs = times(lora.scale, fresh(noise=0.1 if alpha == 0 else 0.0))
    (_, logits), _ = adapted()(pairs)
    (_, expected), _ = whole()(weights())
    for got, want in zip(logits, expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_merged_is_unmerged_and_gradients_are_those_of_whole_matrices():
    pairs = fresh(noise=0.03)
    (loss, logits), grads = adapted()(pairs)
    (expected_loss, expected), whole_grads = whole()(merged(weights() | {"lora": pairs}))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    close(logits, expected, 1e-5)
    assert np.abs(logits[0] - whole()(weights())[0][1][0]).max() > 0.1  # they say something else
    flat, found, of_matrix = flatten_dict(pairs), flatten_dict(grads), flatten_dict(whole_grads)
    assert len(flat) == 2 * len(list(adapted_paths(MODEL, LORA))) > 70
    for path in adapted_paths(MODEL, LORA):
        a, b, g = flat[(*path, "a")], flat[(*path, "b")], of_matrix[path]
        check(path, found[(*path, "a")], matmul(g, jnp.swapaxes(b, -1, -2)))
        check(path, found[(*path, "b")], matmul(jnp.swapaxes(a, -1, -2), g))


def test_full_rank_moves_as_the_whole_matrix():
    """With an identity as a, a step of b is the step of W itself."""

    def identity(path, leaf):
        if path[-1].key == "b":
            return jnp.zeros_like(leaf)
        return jnp.broadcast_to(jnp.eye(*leaf.shape[-2:]), leaf.shape)

    _, grads = adapted()(jax.tree_util.tree_map_with_path(identity, fresh()))
    _, whole_grads = whole()(weights())
    of_b, of_matrix = flatten_dict(grads), flatten_dict(whole_grads)
    for path in adapted_paths(MODEL, LORA):
        g = of_matrix[path]
        check(path, of_b[(*path, "b")][..., : g.shape[-2], :], g)


def check(path, got, want):
    error = np.linalg.norm(np.asarray(got - want))
    assert error <= 1e-5 * np.linalg.norm(np.asarray(want)) + 1e-8, path


def test_a_step_computes_no_gradient_of_a_matrix():
    """At most 0.72 of the work of a step of all weights: 2 products a matrix instead of 3.

    XLA counts a loop's body once, here and there. Matrices are wide, so that pairs are little work.
    """
    model = MODEL.replace(
        num_hidden_layers=1,
        num_nextn_predict_layers=0,
        compress_ratios=(0,),
        hidden_size=512,
        moe_intermediate_size=384,
        num_attention_heads=8,
        head_dim=48,
        q_lora_rank=320,
        o_lora_rank=160,
        vocab_size=1024,
    )
    lora, batch = Lora(rank=4), {"tokens": jax.ShapeDtypeStruct((2, 32), jnp.int32)}
    params = abstract_params(model)
    router = params.pop("router")

    def loss(params, batch):
        return loss_and_routing(model, params, batch)[0]

    def all_weights(params, router, batch):
        return jax.grad(lambda p: loss(p | {"router": router}, batch))(params)

    def pairs_alone(pairs, params, router, batch):
        fixed = params | {"router": router}
        return jax.grad(lambda p: loss(fixed | {"lora": p}, batch))(pairs)

    step = jax.jit(all_weights).lower(params, router, batch).compile()
    pairs = abstract_adapters(model, lora)
    light = jax.jit(pairs_alone).lower(pairs, params, router, batch).compile()
    assert light.cost_analysis()["flops"] <= 0.72 * step.cost_analysis()["flops"]
    made = [set(re.findall(r"f32\[([\d,]+)\]\S* dot\(", p.as_text())) for p in (step, light)]
    for shape in ("320,384", "384,320", "4,512,384"):  # of wq_b, and of 4 blocks' experts
        assert shape not in made[1]
    assert made[0] & {"320,384", "384,320"} and "4,512,384" in made[0]


def test_targets_are_names_of_the_checkpoint_or_globs():
    def found(**fields):
        paths = adapted_paths(SMALL, Lora(rank=2, **fields))
        return {target_name(leaves(SMALL)[path].spec) for path in paths}

    assert found(targets=("wq_b", "head")) == {"attn.wq_b", "head"}
    assert found(targets=("experts.*",)) == {f"ffn.experts.{n}" for n in ("w1", "w2", "w3")}
    shared = {f"ffn.shared_experts.{n}" for n in ("w1", "w2", "w3")}
    assert found(targets=("w?",), experts=False) == shared
    everything = found()
    assert {"e_proj", "ffn.gate", "attn.compressor.wkv", "ffn.experts.w1"} < everything
    assert not any("indexer" in name or "hc_" in name or "norm" in name for name in everything)
    assert found(targets=("indexer.*",)) == {
        f"attn.indexer.{n}" for n in ("wq_b", "weights_proj", "compressor.wkv", "compressor.wgate")
    }
    assert found(targets=("indexer.wq_b",)) == {"attn.indexer.wq_b"}
    assert matches("attn.*", "attn.wo_a") and not matches("wo", "attn.wo_a")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": 0}, "lora.rank: got 0; must be at least 1"),
        ({"alpha": -1.0}, "lora.alpha: got -1.0; must be finite"),
        ({"dropout": 1.0}, r"lora.dropout: got 1.0; must be in \[0, 1\)"),
        ({"scaling": "none"}, "lora.scaling: got 'none'; allowed: plain, rank_stabilised"),
        ({"optimizer": "sgd"}, "lora.optimizer: got 'sgd'; allowed: adamw, muon"),
        ({"targets": ()}, "lora.targets: got .*at least one"),
        ({"targets": "attn.*"}, r"lora.targets: got 'attn.\*'; must be a tuple of names"),
        ({"targets": ("wq_b", "q_proj")}, "'q_proj' matches no matrix; there are attn.comp.*head"),
        ({"targets": ("experts.*",), "experts": False}, "'experts.[*]' matches no matrix"),
        ({"dropout": 0.1}, "lora.dropout: got 0.1; must be 0 where routed experts have pairs"),
    ],
)
def test_bad_adapters_are_refused_in_one_line(fields, said):
    with pytest.raises(ValueError, match=said) as refused:
        list(adapted_paths(SMALL, Lora(**{"rank": 2} | fields)))
    assert "\n" not in str(refused.value)


def test_scales():
    assert Lora(rank=16, alpha=32).scale == 2
    assert Lora(rank=16, alpha=32, scaling="rank_stabilised").scale == 8


def test_pairs_lie_as_what_they_adapt():
    shapes, axes = (flatten_dict(f(SMALL, LORA)) for f in (abstract_adapters, adapter_axes))
    at = ("layers_1_2", "block_0", "ffn", "experts", "w2")
    assert shapes[(*at, "a")].shape == (2, 8, 16, RANK)
    assert shapes[(*at, "b")].shape == (2, 8, RANK, 32)
    assert axes[(*at, "a")] == ("layers", "experts", "expert_hidden", None)
    assert axes[(*at, "b")] == ("layers", "experts", None, "expert_embed")
