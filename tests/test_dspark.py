"""DSpark: drafts are the reference's, and speculation changes no token."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drafters import dspark_config, random_drafter, tree_of
from reference import dspark as reference
from reference.weights import random_weights
from releases import BLOCK, carried_tensors, make_release
from trees import small_config

from v4jax.api import place_on
from v4jax.cache.layer import ChunkSpan
from v4jax.checkpoint.formats import FP8, MXFP4, Kind, Stored, decode
from v4jax.checkpoint.load_drafter import drafter_config, load_drafter
from v4jax.checkpoint.names import from_official
from v4jax.cli import main as cli
from v4jax.generate import command as generate_command
from v4jax.generate.cache import empty_cache, extend
from v4jax.generate.decode import generate
from v4jax.generate.drafts import block_logits, draft_block, keep_context, with_taps
from v4jax.generate.sampling import Sampling
from v4jax.generate.steps import DecodeConfig
from v4jax.model.dspark import ROOT

CFG = small_config(
    num_hidden_layers=4,
    compress_ratios=(0, 4, 128, 4),
    num_nextn_predict_layers=0,
    num_hash_layers=1,
    rms_norm_eps=1e-20,
)
DSPARK = dspark_config((1, 2, 3))


@pytest.fixture(scope="module")
def model():
    """(official weights of trunk and drafter, v4jax's parameters)."""
    drafter = random_drafter(CFG, DSPARK)
    weights = random_weights(CFG, 0)
    params = from_official(CFG, weights) | {ROOT: tree_of(CFG, DSPARK, drafter)}
    return weights | drafter, jax.tree.map(jnp.asarray, params)


@functools.partial(jax.jit, static_argnums=0)
def drafted(decoding, params, tokens_BS, newest_B, count_B):
    """Drafts after the first tokens of each row, all of which run as one chunk."""
    cache = empty_cache(CFG, len(tokens_BS), 256, stages=DSPARK.stages)
    ctx = with_taps(decoding.ctx)
    chunk, cache = extend(CFG, params, cache, tokens_BS, count_B, ctx)
    span = ChunkSpan(jnp.zeros_like(count_B), count_B)
    cache = keep_context(CFG, DSPARK, params, cache, chunk, span, decoding.ctx)
    found = block_logits(CFG, DSPARK, params, cache, newest_B, decoding.ctx)
    own = (decoding.sampling, decoding.ctx)
    seed_B = jnp.zeros_like(newest_B)
    return found, *draft_block(CFG, DSPARK, params, cache, newest_B, seed_B, *own)


def test_drafts_and_confidences_are_the_references(model):
    """Contexts shorter than the window, as long, longer, and none at all."""
    weights, params = model
    rng = np.random.default_rng(0)
    counts = [0, 3, CFG.sliding_window, 61]
    tokens_BS = rng.integers(0, CFG.vocab_size, (len(counts), 61))
    newest_B = rng.integers(0, CFG.vocab_size, len(counts))
    found, got, confidence = drafted(
        DecodeConfig(), params, jnp.asarray(tokens_BS), jnp.asarray(newest_B), jnp.asarray(counts)
    )
    for b, count in enumerate(counts):
        row = [*tokens_BS[b, :count], newest_B[b]]
        expected = reference.draft(CFG, DSPARK, weights, row)
        np.testing.assert_allclose(found.plain_BGV[b], expected.plain_GV, atol=1e-4)
        np.testing.assert_array_equal(got[b], expected.tokens_G)
        np.testing.assert_allclose(confidence[b], expected.confidence_G, atol=1e-4)


def never(*_):
    return False


def with_few_tokens(params):
    """A head of three tokens makes drafts agree often: kept ones must be as good as rejected."""
    few_1V = (jnp.arange(CFG.vocab_size) < 3)[None]
    head = jnp.where(few_1V, params["head"]["weight"], 0.0)
    drafter = params[ROOT] | {"markov_w2": jnp.where(few_1V, params[ROOT]["markov_w2"], 0.0)}
    return params | {"head": {"weight": head}, ROOT: drafter}


SAMPLED = Sampling(temperature=0.5, top_k=3)


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(Sampling(), marks=pytest.mark.long, id="greedy"),
        pytest.param(SAMPLED, id="sampled"),
    ],
)
def test_speculation_changes_no_token(model, sampling):
    """Rows of different lengths cross windows of every kind; drafts are kept and rejected."""
    _, params = model
    params = with_few_tokens(params)
    rng = np.random.default_rng(7)
    prompts = [rng.integers(0, CFG.vocab_size, n).tolist() for n in (118, 1, 9)]
    plain = DecodeConfig(sampling=sampling)
    expected = generate(CFG, params, prompts, 30, stop=never, decoding=plain)
    drafting = plain._replace(speculative=True, dspark=DSPARK)
    got = generate(CFG, params, prompts, 30, stop=never, decoding=drafting)
    assert [row.tokens for row in got] == [row.tokens for row in expected]
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=2e-4)
        assert a.rounds * DSPARK.block_size == a.drafted > a.accepted == sum(a.accepted_at)
        assert list(a.accepted_at) == sorted(a.accepted_at, reverse=True)
    assert sum(row.accepted for row in got) >= 5
    assert sum(row.accepted_at[1] for row in got) >= 1


def test_a_block_longer_than_a_rings_spare_places_is_refused(model):
    _, params = model
    decoding = DecodeConfig(speculative=True, dspark=dspark_config((1, 2, 3), block_size=8))
    with pytest.raises(ValueError, match="dspark_block_size: got 8; v4jax drafts at most 7"):
        generate(CFG, params, [[1]], 4, decoding=decoding)
    with pytest.raises(ValueError, match="no MTP layer and no DSpark drafter"):
        generate(CFG, params, [[1]], 4, decoding=DecodeConfig(speculative=True))


@pytest.mark.slow
def test_the_command_drafts_with_what_the_checkpoint_has(tmp_path, capsys):
    """fp8 and MXFP4 drafters are read; acceptance is told by position."""
    make_release(tmp_path / "release", "flash-0731")
    command = ["generate", str(tmp_path / "release"), "--tokens", "3,5,7", "--json"]
    command += ["--max-new-tokens", "12", "--stop-tokens", "96"]
    assert cli.main(command) == 0
    plain = json.loads(capsys.readouterr().out)
    assert cli.main([*command, "--speculative"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == plain["tokens"]
    assert found["drafted"] == BLOCK * found["rounds"] > 0 and len(found["accepted_at"]) == BLOCK


def test_a_release_loads_as_its_tensors_say(tmp_path):
    """The tree that is loaded is that of the decoded official tensors."""
    cfg, _ = make_release(tmp_path / "release", "flash-vision-exp")
    config = drafter_config(tmp_path / "release")
    mesh, rules = place_on(None, None)
    found = load_drafter(tmp_path / "release", cfg, config, "float32", mesh, rules)
    tensors = carried_tensors(cfg, "flash-vision-exp")
    numbers = {}
    for name, array in tensors.items():
        if name.endswith(".scale"):
            continue
        scale = tensors.get(name.removesuffix("weight") + "scale")
        kind = {"int8": MXFP4, "float8_e4m3fn": FP8}.get(array.dtype.name, Kind("F32"))
        numbers[name] = np.asarray(decode(kind, Stored(array, scale)), np.float32)
    expected = tree_of(cfg, config, numbers)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(a, b, jax.tree_util.keystr(path))


def _without_drafter(raw, carried):
    carried.clear()


def _not_finite(raw, carried):
    carried["mtp.0.main_norm.weight"][0] = np.nan


@pytest.mark.parametrize(
    ("change", "words", "reads_the_model"),
    [
        (_without_drafter, "has no mtp.* tensors of its DSpark drafter", False),
        (_not_finite, "mtp.0.main_norm.weight: got numbers that are not finite", True),
    ],
)
def test_a_drafter_that_cannot_be_used_ends_in_one_line(
    tmp_path, capsys, monkeypatch, change, words, reads_the_model
):
    make_release(tmp_path / "model", "flash-0731", dtype="bfloat16", change=change)
    load, read = generate_command.load, []
    monkeypatch.setattr(generate_command, "load", lambda *given: read.append(1) or load(*given))
    arguments = ["generate", str(tmp_path / "model"), "--tokens", "1,2", "--speculative"]
    assert cli.main(arguments) == 2
    assert words in capsys.readouterr().err
    assert bool(read) == reads_the_model
