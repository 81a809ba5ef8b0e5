"""Rows continued from a cache give what one full forward gives.

This holds for any chunks, any lengths in a batch, across every boundary.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.weights import random_weights
from trees import small_config

import v4jax
from configs import models as models_of_configs
from v4jax.cache.layer import SPARE_ROWS, ChunkSpan, CompressedKV
from v4jax.cache.rows import keep_rows, key_reader
from v4jax.checkpoint.names import from_official
from v4jax.context import Context
from v4jax.cost import cost, deepseek_v32, gqa8
from v4jax.generate.cache import draft, empty_cache, extend, logits_of, split_layers
from v4jax.kernels import index_scores, index_search

PATTERNS = {
    # every kind of layer (MTP's is window only), and two in a stack
    "few": dict(
        compress_ratios=(4, 4, 128, 0), num_hidden_layers=3, num_hash_layers=0, index_topk=8
    ),
    "flash": dict(
        compress_ratios=(0, 0, 4, 128, 4, 0), num_hidden_layers=5, num_hash_layers=3, index_topk=8
    ),
    # one scanned group of two pairs, so that layers find their place in a stack
    "pairs": dict(
        compress_ratios=(128, 4, 128, 4, 0), num_hidden_layers=4, num_hash_layers=0, index_topk=80
    ),
}
LENGTH = 712
TOLERANCE = 2e-4
"""The bar of issue 6; other chunks sum in another order."""


@pytest.fixture(scope="module")
def models():
    return functools.cache(make_model)


def weights_of(pattern):
    cfg = small_config(**PATTERNS[pattern])
    return cfg, jax.tree.map(jnp.asarray, from_official(cfg, random_weights(cfg, 0)))


def make_model(pattern):
    """(cfg, params, tokens [1,712], their logits and MTP logits by one full forward)."""
    cfg, params = weights_of(pattern)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, LENGTH))
    full = v4jax.forward(cfg, params, jnp.asarray(tokens))
    return cfg, params, tokens, np.asarray(full.logits), np.asarray(full.mtp_logits)


@functools.partial(jax.jit, static_argnums=0)
def step(cfg, params, cache, tokens_BT, next_BT, count_B):
    """Logits and MTP logits of a chunk."""
    start_B = cache.length_B
    chunk, cache = extend(cfg, params, cache, tokens_BT, count_B)
    x_BTD, cache = draft(
        cfg, params, cache, chunk.streams_BTXD, next_BT, ChunkSpan(start_B, count_B)
    )
    return logits_of(params, chunk.x_BTD), logits_of(params, x_BTD), cache


def run(cfg, params, cache, tokens, counts, chunk):
    """Continues every row by counts[b] tokens of tokens[b], `chunk` at a time.

    Returns the logits of each row.
    """
    done, out = np.zeros(len(counts), int), [[] for _ in counts]
    first = np.asarray(cache.length_B)
    while (done < counts).any():
        take = np.minimum(counts - done, chunk)
        rows, following = np.full((2, len(counts), chunk), 96)  # what is not real must not matter
        for b, n in enumerate(take):
            at = first[b] + done[b]
            rows[b, :n] = tokens[b, at : at + n]
            later = tokens[b, at + 1 : at + 1 + n]
            following[b, : len(later)] = later
        logits, mtp, cache = step(
            cfg,
            params,
            cache,
            jnp.asarray(rows),
            jnp.asarray(following),
            jnp.asarray(take, jnp.int32),
        )
        for b, n in enumerate(take):
            out[b].append((np.asarray(logits)[b, :n], np.asarray(mtp)[b, :n]))
        done += take
    return [tuple(np.concatenate(part) for part in zip(*row, strict=True)) for row in out], cache


def check(got, logits, mtp, first):
    """A row's logits from position `first` on; the last one has no following token."""
    n = len(got[0])
    np.testing.assert_allclose(got[0], logits[first : first + n], atol=TOLERANCE)
    known = min(n, LENGTH - 1 - first)
    np.testing.assert_allclose(got[1][:known], mtp[first : first + known], atol=TOLERANCE)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
long = functools.partial(pytest.param, marks=pytest.mark.long)


@pytest.mark.parametrize(
    ("pattern", "chunk"),
    [
        ("few", 64),
        long("flash", 1),
        long("flash", 3),
        long("flash", 64),
        slow("flash", 129),
        long("flash", LENGTH),
        long("pairs", 1),
        long("pairs", 3),
        slow("pairs", 64),
        long("pairs", 129),
        long("pairs", LENGTH),
    ],
)
def test_any_chunks_then_decoding_give_the_full_forward(models, pattern, chunk):
    cfg, params, tokens, logits, mtp = models(pattern)
    prefix = LENGTH if chunk != 1 else 140
    cache = empty_cache(cfg, 1, LENGTH)
    got, cache = run(cfg, params, cache, tokens, np.array([prefix]), chunk)
    check(got[0], logits[0], mtp[0], 0)
    if chunk != 64:
        return
    # Decoding starts just before every boundary: of windows (8 here), of CSA's and HCA's, and
    # further in. One program serves all.
    programs = step._cache_size()
    for start in (2, 126, 509, 699):
        _, cache = run(cfg, params, empty_cache(cfg, 1, LENGTH), tokens, np.array([start]), chunk)
        got, _ = run(cfg, params, cache, tokens, np.array([5]), 1)
        check(got[0], logits[0], mtp[0], start)
    assert step._cache_size() <= programs + 1


@pytest.mark.parametrize("pattern", ["few", long("flash"), long("pairs")])
def test_rows_of_different_lengths_are_rows_alone(models, pattern):
    """Rows are prefilled together in chunks that leave some idle, then decoded together."""
    cfg, params, tokens, logits, mtp = models(pattern)
    rows = np.stack([tokens[0], np.roll(tokens[0], 100), tokens[0]])
    counts = np.array([3, 300, 131])
    got, cache = run(cfg, params, empty_cache(cfg, 3, LENGTH), rows, counts, 64)
    more, cache = run(cfg, params, cache, rows, np.array([6, 6, 6]), 1)
    np.testing.assert_array_equal(cache.length_B, counts + 6)
    for b in (0, 2):
        check(got[b], logits[0], mtp[0], 0)
        check(more[b], logits[0], mtp[0], counts[b])
    alone, cache = run(cfg, params, empty_cache(cfg, 1, LENGTH), rows[1:2], counts[1:2], 64)
    alone_more, _ = run(cfg, params, cache, rows[1:2], np.array([6]), 1)
    np.testing.assert_allclose(got[1][0], alone[0][0], atol=TOLERANCE)
    np.testing.assert_allclose(more[1][0], alone_more[0][0], atol=TOLERANCE)


@pytest.mark.slow
def test_long_rows_are_scored_in_blocks(models, monkeypatch):
    """Blocks do not divide the cache; maxima search it, at lengths the other tests check."""
    cfg, params, tokens, logits, mtp = models("flash")
    monkeypatch.setattr(index_scores, "SCORE_BLOCK", 80)
    monkeypatch.setattr(index_search, "GROUP", 4)
    keys = key_reader(CompressedKV(jnp.zeros((1, 1, 192, 1)), 0, 0), jnp.float32)
    assert index_search.may_search(keys, cfg.index_topk)
    cfg = cfg.replace(bos_token_id=2)  # another program
    got, cache = run(cfg, params, empty_cache(cfg, 1, LENGTH), tokens, np.array([387]), 129)
    check(got[0], logits[0], mtp[0], 0)
    got, cache = run(cfg, params, cache, tokens, np.array([3]), 1)
    check(got[0], logits[0], mtp[0], 387)


@pytest.mark.parametrize("rows", [1, 3, SPARE_ROWS])
def test_a_few_rows_are_kept_as_many_are(rows):
    """A ring written row by row equals a new ring.

    Also across its end, and where some or all rows of a chunk are not real.
    """
    rng = np.random.default_rng(0)
    ring = jnp.asarray(rng.standard_normal((2, 4, 12, 5)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((4, rows, 5)), jnp.float32)
    span = ChunkSpan(jnp.array([0, 11, 35, 7]), jnp.minimum(jnp.array([rows, rows, 0, 2]), rows))
    longer = jnp.pad(
        x, ((0, 0), (0, SPARE_ROWS), (0, 0)), constant_values=9
    )  # filled up, which must not matter
    (few, few_before), (many, many_before) = (
        keep_rows(ring, jnp.int32(1), new, span) for new in (x, longer)
    )
    np.testing.assert_array_equal(few, many)
    before = ring.shape[2] - SPARE_ROWS
    for b, count in enumerate(
        np.asarray(span.count_B)
    ):  # the rows that a later token sees, and the real ones
        np.testing.assert_array_equal(
            few_before(before)[b, : before + count], many_before(before)[b, : before + count]
        )


@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_copies_no_cache(batch):
    """A token writes a row of each array of the cache; the compiled program copies none of them."""
    cfg, params = weights_of("few")
    params, cache = split_layers(cfg, params), empty_cache(cfg, batch, 2**14)
    one = functools.partial(jax.jit, donate_argnums=1)(
        lambda params, cache, token_B1, count_B: extend(cfg, params, cache, token_B1, count_B)
    )
    program = (
        one.lower(params, cache, jnp.zeros((batch, 1), jnp.int32), jnp.ones(batch, jnp.int32))
        .compile()
        .as_text()
    )
    copied = {
        tuple(map(int, shape.split(",")))
        for shape in re.findall(r"= f32\[([\d,]+)\]\S* copy\(", program)
    }
    leaves = {leaf.shape for leaf in jax.tree.leaves(cache)}
    assert copied and not copied & leaves
    # No array that grows with the tokens is transposed either.
    entries = {tuple(sorted(shape)) for shape in leaves if 2**14 // 4 in shape}
    assert len(entries) == 2 and not {tuple(sorted(shape)) for shape in copied} & entries


def test_packed_storage_changes_nothing():
    """fp8 and MXFP4 hold the numbers that the model computed with, in bfloat16 and
    quant="official".

    States are equal bit for bit.
    """
    cfg = small_config(
        compress_ratios=(4, 128, 0),
        num_hidden_layers=2,
        num_hash_layers=0,
        hidden_size=32,
        moe_intermediate_size=32,
        head_dim=88,
        index_head_dim=32,
        qk_rope_head_dim=8,
    )
    params = jax.tree.map(jnp.asarray, from_official(cfg, random_weights(cfg, 0)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 70)))

    @jax.jit
    def go(cache, count_B):
        chunk, cache = extend(
            cfg, params, cache, tokens, count_B, Context(dtype=jnp.bfloat16, quant="official")
        )
        return chunk.x_BTD, cache

    states, sizes = [], []
    for storage in ("dtype", "official"):
        cache = empty_cache(cfg, 2, 256, jnp.bfloat16, storage)
        _, cache = go(cache, jnp.array([70, 61]))
        x_BTD, cache = go(cache, jnp.array([70, 70]))
        states.append(x_BTD)
        (slots,) = [
            block.entry.slots
            for group in cache.layers.values()
            for block in group.values()
            if block.index is not None
        ]
        sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(slots)))
    np.testing.assert_array_equal(*states)
    assert sizes == [2 * 64 * 88 * 2, 2 * 64 * (80 + 2 + 2 * 8)]


@pytest.mark.parametrize(("name", "most"), [("flash", 0.074), ("pro", 0.106)])
def test_a_million_tokens_take_the_bytes_the_report_says(name, most):
    """The full model's real pytree in official storage, beside DeepSeek-V3.2 and bf16 GQA-8.

    Nothing is computed.
    """
    cfg, tokens = getattr(models_of_configs, name)(), 2**20
    cache = jax.eval_shape(lambda: empty_cache(cfg, 1, tokens, jnp.bfloat16, "official"))
    size = sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((cache.layers, cache.mtp))
    )
    assert size <= most * deepseek_v32(tokens).cache
    assert 0.015 < size / gqa8(cfg, tokens).cache < 0.022
    # cost.py counts the same from the configuration alone, less the rings' spare rows and MTP.
    assert size == pytest.approx(cost(cfg, tokens).total.cache, rel=2e-3)
