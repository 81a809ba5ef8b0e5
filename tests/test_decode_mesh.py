"""Rows continued on a mesh give what one full forward gives; a cut cache stays where it is."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.weights import random_weights
from trees import small_config

import v4jax
from sharding.mesh import make_mesh, parse_mesh
from sharding.params import named_shardings
from sharding.rules import layout_for
from v4jax.checkpoint.names import from_official
from v4jax.context import Context
from v4jax.generate.cache import decoding_rules, empty_cache, extend, logits_of, split_layers
from v4jax.generate.decode import generate
from v4jax.generate.steps import DecodeConfig
from v4jax.kernels import index_scores, index_search
from v4jax.model import entries
from v4jax.parameter_tree import abstract_params, param_axes

CFG = small_config(
    compress_ratios=(4, 128, 0),
    num_hidden_layers=2,
    num_hash_layers=1,
    hidden_size=40,
    moe_intermediate_size=24,
    vocab_size=96,
    num_attention_heads=8,
    o_groups=8,
    o_lora_rank=5,
    q_lora_rank=40,
    n_routed_experts=8,
    index_n_heads=8,
    index_head_dim=24,
    index_topk=7,
)
CHUNK, LENGTH, ROOM = 150, 451, 1024
SLOTS = ROOM // 4
"""Entries of CSA. No other axis of the model is as long, or a half, a quarter or an eighth of it.
"""


@pytest.fixture(scope="module")
def model():
    """(parameters, tokens of two rows, their logits by one full forward)."""
    params = jax.tree.map(jnp.asarray, from_official(CFG, random_weights(CFG, 0)))
    tokens = np.random.default_rng(0).integers(0, CFG.vocab_size, (8, LENGTH))
    return params, tokens, np.asarray(v4jax.forward(CFG, params, jnp.asarray(tokens)).logits)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def step(rules, params, cache, tokens_BT):
    chunk, cache = extend(
        CFG,
        params,
        cache,
        tokens_BT,
        jnp.full(len(tokens_BT), tokens_BT.shape[1], jnp.int32),
        Context(rules=rules),
    )
    return logits_of(params, chunk.x_BTD, Context(rules=rules)), cache


@pytest.mark.parametrize(("mesh", "searches"), [("data=4", True), ("tensor=4", False)])
def test_a_long_cache_is_searched_where_one_device_has_all_index_heads(mesh, searches, monkeypatch):
    """Every layout names the axes that could cut them; a size of 1 cuts nothing."""
    monkeypatch.setattr(index_search, "GROUP", 1)
    monkeypatch.setattr(index_scores, "SCORE_BLOCK", 24)
    asked = []
    best_slots = entries.best_slots
    monkeypatch.setattr(entries, "best_slots", lambda *args: asked.append(1) or best_slots(*args))
    sizes = parse_mesh(mesh)
    own = layout_for(None, sizes)
    assert own.mesh_axes("index_heads")
    with jax.set_mesh(make_mesh(sizes)):
        rules = decoding_rules(own)
        params = jax.eval_shape(lambda p: split_layers(CFG, p, rules), abstract_params(CFG))
        cache = jax.eval_shape(lambda: empty_cache(CFG, 4, ROOM, rules=rules))
        jax.eval_shape(functools.partial(step, rules), params, cache, jnp.zeros((4, 1), int))
    assert bool(asked) == searches


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
long = functools.partial(pytest.param, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("mesh", "layout"),
    [
        ("data=2,context=4", None),
        slow("context=8", "cp_ep"),
        long("context=2,expert=2,tensor=2", None),
    ]
    + [
        long("tensor=8", None),
        long("expert=8", None),
        long("data=2,fsdp=4", None),
        slow("context=2,expert=4", "pod"),
    ],
)
def test_rows_continued_on_a_mesh_are_those_of_one_device(model, mesh, layout, monkeypatch):
    """Feeds three chunks and one token; scores come in blocks of 24 keys, which divide no share."""
    monkeypatch.setattr(index_scores, "SCORE_BLOCK", 24)
    monkeypatch.setattr(index_search, "GROUP", 1)  # cp_ep, which does not cut index heads, searches
    params, tokens, expected = model
    sizes = parse_mesh(mesh)
    device_mesh, own = make_mesh(sizes), layout_for(layout, sizes)
    rows = 8 if sizes["expert"] * sizes["fsdp"] > 2 else 2
    with jax.set_mesh(device_mesh):
        rules = decoding_rules(own)
        params = jax.device_put(
            params, named_shardings(device_mesh, own, abstract_params(CFG), param_axes(CFG))
        )
        params, cache, got = (
            split_layers(CFG, params, rules),
            jax.jit(lambda: empty_cache(CFG, rows, ROOM, rules=rules))(),
            [],
        )
        for start in range(0, LENGTH, CHUNK):
            logits, cache = step(
                rules, params, cache, jnp.asarray(tokens[:rows, start : start + CHUNK])
            )
            got.append(np.asarray(logits))
        np.testing.assert_allclose(
            np.concatenate(got, axis=1), expected[:rows], atol=2e-4
        )  # issue 6: sums in another order
        if sizes["context"] > 1:
            check_traffic(
                step.lower(rules, params, cache, jnp.asarray(tokens[:rows, :1]))
                .compile()
                .as_text(),
                cache,
                sizes["context"],
            )


def check_traffic(program: str, cache, parts: int) -> None:
    """Every device holds its slice of the entries, and only scores of the best of each travel."""
    slots = cache.layers["layers_0_0"]["block_0"].entry.slots
    assert {shard.data.shape[2] for shard in slots.addressable_shards} == {SLOTS // parts}
    found = re.findall(
        r"= \w+\[([\d,]+)\]\S* (all-gather|all-to-all|collective-permute|all-reduce)\(", program
    )
    sizes = [([int(size) for size in shape.split(",")], kind) for shape, kind in found]
    assert any(parts * CFG.index_topk in shape for shape, _ in sizes), (
        "where are the scores of all?"
    )
    for shape, kind in sizes:
        # The index heads of other devices add their scores of a slice, a number a key: no rows.
        assert SLOTS not in shape and (
            SLOTS // parts not in shape or (kind == "all-reduce" and np.prod(shape) <= 2 * SLOTS)
        ), (shape, kind)


@pytest.mark.parametrize("speculative", [long(False), slow(True)])
def test_generate_on_a_cut_cache(model, speculative):
    """One row leaves only its cache to cut."""
    params, tokens, _ = model
    prompt = tokens[0, :130].tolist()

    def never(*_):
        return False

    (expected,) = generate(CFG, params, [prompt], 8, stop=never, capacity=ROOM)
    sizes = parse_mesh("context=4")
    with jax.set_mesh(make_mesh(sizes)):
        decoding = DecodeConfig(rules=layout_for(None, sizes), speculative=speculative)
        (got,) = generate(CFG, params, [prompt], 8, stop=never, capacity=ROOM, decoding=decoding)
    assert got.tokens == expected.tokens
    np.testing.assert_allclose(got.log_probs, expected.log_probs, atol=2e-4)
