"""Compress ratios in any order and at other sizes, and rows of zeros at a tiny eps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from reference import transformer
from reference.weights import random_weights
from trees import small_config

import v4jax
from sharding.rules import AxisRules
from v4jax.checkpoint.names import from_official
from v4jax.config import ModelConfig
from v4jax.context import Context
from v4jax.cost import cost
from v4jax.generate.decode import generate
from v4jax.planner.terms import constants_of
from v4jax.train.loss import loss_and_routing

ORDERS = {"32 first": (32, 0, 4, 64, 0), "csa first": (4, 128, 16, 0, 0)}


def config(ratios, **changes):
    return small_config(
        num_hidden_layers=len(ratios) - 1,
        compress_ratios=ratios,
        num_hash_layers=1,
        index_n_heads=8,
        **changes,
    )


@pytest.fixture(scope="module", params=ORDERS)
def model(request):
    cfg = config(ORDERS[request.param], rms_norm_eps=1e-20)
    weights = random_weights(cfg, 0)
    return cfg, weights, jax.tree.map(jnp.asarray, from_official(cfg, weights))


def test_the_forward_pass_is_the_references(model):
    cfg, weights, params = model
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, 140))
    got = v4jax.forward(cfg, params, jnp.asarray(tokens)).logits
    expected = transformer.forward(cfg, weights, tokens).logits
    np.testing.assert_allclose(got, expected, atol=2e-4)


def test_decoding_continues_rows_as_the_forward_pass_says(model):
    cfg, _, params = model
    prompt = np.random.default_rng(1).integers(0, cfg.vocab_size, 61).tolist()
    (found,) = generate(cfg, params, [prompt], 8, stop=lambda *_: False)
    row = jnp.asarray([[*prompt, *found.tokens]])
    logits = v4jax.forward(cfg, params, row).logits[0, len(prompt) - 1 : -1]
    assert found.tokens == jnp.argmax(logits, axis=-1).tolist()


def test_any_number_of_zeros_may_follow():
    raw = config((32, 0, 4, 0)).to_dict()
    for zeros in range(4):
        cfg = ModelConfig.from_dict(raw | {"compress_ratios": [32, 0, 4, *[0] * zeros]})
        assert cfg.compress_ratios == (32, 0, 4, 0)
        without = raw | {"num_nextn_predict_layers": 0, "compress_ratios": [32, 0, 4, *[0] * zeros]}
        assert ModelConfig.from_dict(without).compress_ratios == (32, 0, 4)


@pytest.mark.parametrize("ratio", [1, 3, 48, 256, -4, 32.0, True])
def test_what_cannot_be_built_is_refused_by_name(ratio):
    with pytest.raises(ValueError, match=f"compress_ratios: got {ratio}; allowed: 0 .*divisors"):
        config((ratio, 4, 0))


def test_the_transformers_style_may_name_another_ratio():
    raw = config((32, 0, 4, 0)).to_dict()
    del raw["compress_ratios"]
    names = ("heavily_compressed_attention", "sliding_attention", "compressed_sparse_attention")
    raw |= {"layer_types": names, "compress_rates": {names[0]: 32, names[2]: 4}}
    assert ModelConfig.from_dict(raw).compress_ratios == (32, 0, 4, 0)
    raw["compress_rates"] = {names[2]: 8}
    with pytest.raises(ValueError, match="compressed_sparse_attention=8; DeepSeek-V4 allows only"):
        ModelConfig.from_dict(raw)


def test_costs_have_a_line_for_it_and_the_layout_lab_refuses_it():
    cfg = config((32, 0, 4, 0))
    parts = {part.name: part for part in cost(cfg, 4096).parts}
    plain = {part.name: part for part in cost(config((128, 0, 4, 0)), 4096).parts}
    assert parts["attention 1/32"].cache > plain["attention HCA"].cache > 0
    with pytest.raises(ValueError, match="got 32; the layout lab estimates 0, 4 and 128 only"):
        constants_of(cfg, AxisRules(), {})


def test_gradients_are_finite_where_rows_are_zero_in_all_layers():
    """Token 0, whose embedding is zeros, is first: its rows stay zero. Later it sees other tokens.

    A product of derivatives rsqrt(eps) over norms and layers would overflow.
    """
    cfg = config((4, 32, 0), rms_norm_eps=1e-20)
    params = jax.tree.map(jnp.asarray, from_official(cfg, random_weights(cfg, 0)))
    params["embed"]["weight"] = params["embed"]["weight"].at[0].set(0.0)
    rows = jnp.asarray([[0] * 33 + [*range(1, 8)], [5, 6] + [0] * 10 + [*range(1, 29)]])
    grads = jax.jit(
        jax.grad(lambda params: loss_and_routing(cfg, params, {"tokens": rows}, Context())[0])
    )(params)
    largest = {path: float(jnp.abs(grad).max()) for path, grad in flatten_dict(grads).items()}
    assert all(size < 100 for size in largest.values()), largest
    assert jnp.abs(grads["embed"]["weight"][0]).max() > 1e-3  # so the row can leave zero
