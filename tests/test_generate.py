"""Generation: sampling, stops, streaming; greedy text is transformers' own.

Bad input is in test_run.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.weights import random_weights
from trees import small_config

import v4jax
from v4jax.checkpoint.names import from_official
from v4jax.generate.decode import generate
from v4jax.generate.sampling import Sampling, shaped_logits
from v4jax.generate.steps import DecodeConfig
from v4jax.generate.text import TextStop
from v4jax.tokenizer import ByteTokenizer

SMALL = dict(
    compress_ratios=(4, 128, 0),
    num_hidden_layers=2,
    num_hash_layers=1,
    index_n_heads=8,
    index_topk=8,
    hidden_size=32,
    moe_intermediate_size=16,
)

CAPACITY = 138
"""Tokens of a row in most tests: together with three rows and prompts above 64, one program."""


@pytest.fixture(scope="module")
def model():
    cfg = small_config(**SMALL)
    return cfg, jax.tree.map(jnp.asarray, from_official(cfg, random_weights(cfg, 0)))


def never(*_):
    return False


def test_greedy_is_the_argmax_and_log_probs_are_the_forwards(model):
    """Prompts of different lengths run together, past a window of every kind."""
    cfg, params = model
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, cfg.vocab_size, n).tolist() for n in (125, 3, 9)]
    completions = generate(cfg, params, prompts, 6, stop=never, capacity=CAPACITY)
    for prompt, completion in zip(prompts, completions, strict=True):
        # Right padding changes nothing, and one length is one program.
        row = np.zeros((1, 131), np.int32)
        row[0, : len(prompt) + 6] = prompt + completion.tokens
        logits = np.asarray(v4jax.forward(cfg, params, jnp.asarray(row)).logits)[
            0, len(prompt) - 1 :
        ][:6]
        np.testing.assert_array_equal(completion.tokens, logits.argmax(-1))
        expected = jax.nn.log_softmax(logits)[np.arange(6), completion.tokens]
        np.testing.assert_allclose(
            completion.log_probs, expected, atol=2e-4
        )  # as logits of a cache, issue 6
        assert completion.ended == "length"


def test_logits_that_are_no_numbers_are_said_and_not_given(model):
    cfg, params = model
    broken = params | {"norm": {"weight": params["norm"]["weight"].at[0].set(jnp.nan)}}
    with pytest.raises(ValueError, match="sequence 0: the model's logits are NaN at new token 0"):
        generate(cfg, broken, [[3] * 65], 2, rows=3, capacity=CAPACITY)


def test_prompts_and_lengths_may_be_arrays(model):
    rows = np.arange(3 * 65).reshape(3, 65) % 97
    same = dict(stop=never, capacity=CAPACITY)
    assert generate(*model, rows, np.int64(2), **same) == generate(
        *model, rows.tolist(), [2, 2, 2], **same
    )
    with pytest.raises(
        ValueError, match=r"max_new_tokens: got 2 numbers; must be one, or one for each of 3 prompt"
    ):
        generate(*model, rows, [1, 2])


@pytest.mark.slow
def test_what_a_sequence_samples_depends_on_its_seed_alone(model):
    cfg, params = model
    warm = Sampling(temperature=1.5)
    together = generate(
        cfg,
        params,
        [[3, 5, 7], [9], [3, 5, 7]],
        12,
        decoding=DecodeConfig(sampling=warm),
        seeds=[4, 0, 5],
        stop=never,
    )
    alone = generate(
        cfg, params, [[3, 5, 7]], 12, decoding=DecodeConfig(sampling=warm), seeds=[5], stop=never
    )
    assert together[2].tokens == alone[0].tokens
    assert together[0].tokens != together[2].tokens
    stopped = generate(
        cfg,
        params,
        [[3, 5, 7]],
        12,
        decoding=DecodeConfig(sampling=warm),
        seeds=[5],
        stop=lambda _, tokens: len(tokens) == 4,
    )
    assert (stopped[0].tokens, stopped[0].ended) == (alone[0].tokens[:4], "stop")


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.2])
def test_speculation_changes_no_token(model, temperature):
    """Rows of different lengths cross windows of both ratios; drafts are kept and rejected."""
    cfg, params = model
    prompts = [
        np.random.default_rng(7).integers(0, cfg.vocab_size, n).tolist() for n in (118, 1, 9)
    ]
    plain = DecodeConfig(sampling=Sampling(temperature=temperature))
    expected = generate(cfg, params, prompts, 20, stop=never, decoding=plain)
    got = generate(cfg, params, prompts, 20, stop=never, decoding=plain._replace(speculative=True))
    for a, b in zip(got, expected, strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=2e-4)
    assert sum(row.drafted for row in got) > sum(row.accepted for row in got)


def cut(tokens, ends):
    """The row up to the first of the ends, which is included."""
    return tokens[: next((n for n, token in enumerate(tokens, 1) if token in ends), len(tokens))]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("speculative", [False, True])
def test_a_row_ends_at_the_first_of_all_end_tokens(model, speculative, order):
    """Neither order nor repetition matters. The programs are those of the test above."""
    cfg, params = model
    prompts = [
        np.random.default_rng(7).integers(0, cfg.vocab_size, n).tolist() for n in (118, 1, 9)
    ]
    decoding = DecodeConfig(sampling=Sampling(temperature=1.2), speculative=speculative)
    whole = [
        row.tokens for row in generate(cfg, params, prompts, 20, stop=never, decoding=decoding)
    ]
    ends = [cfg.eos_token_id, whole[0][4], whole[1][2], whole[2][7], whole[0][4]]
    listed = cfg.replace(more_eos_token_ids=tuple(ends[::order]))
    rows = generate(listed, params, prompts, 20, decoding=decoding)
    assert [row.tokens for row in rows] == [cut(tokens, ends) for tokens in whole]
    assert {row.ended for row in rows} == {"stop"} and len({row.tokens[-1] for row in rows}) > 1
    alone = generate(cfg, params, prompts, 20, decoding=decoding)
    assert [row.tokens for row in alone] == [cut(tokens, [cfg.eos_token_id]) for tokens in whole]


@pytest.mark.slow
def test_accepted_drafts_are_taken(model):
    """A head of few columns makes MTP agree often: kept drafts must be as good as rejected ones."""
    cfg, params = model
    params = params | {
        "head": {
            "weight": params["head"]["weight"].at[:, 3:].set(0)
            * jnp.where(jnp.arange(97) < 3, 1, 0)[None]
        }
    }
    few = DecodeConfig(sampling=Sampling(temperature=0.5, top_k=3))
    expected = generate(cfg, params, [[5, 6, 7], [8]], 40, stop=never, decoding=few)
    got = generate(
        cfg, params, [[5, 6, 7], [8]], 40, stop=never, decoding=few._replace(speculative=True)
    )
    assert [row.tokens for row in got] == [row.tokens for row in expected]
    assert sum(row.accepted for row in got) >= 5
    ended = generate(
        cfg,
        params,
        [[5, 6, 7]],
        40,
        stop=lambda _, ids: len(ids) == 9,
        decoding=few._replace(speculative=True),
    )
    assert ended[0].tokens == expected[0].tokens[:9]


def test_filters_keep_what_they_say():
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.06, 0.04]], np.float32))

    def kept(**filters):
        shaped = shaped_logits(Sampling(temperature=1.0, **filters), jnp.asarray(logits))
        return np.flatnonzero(np.isfinite(np.asarray(shaped)[0])).tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_p=0.69) == [0, 1] and kept(top_p=0.71) == [0, 1, 2] and kept(top_p=0.1) == [0]
    assert kept(min_p=0.4) == [0, 1, 2] and kept(min_p=1.0) == [0]
    assert kept(top_k=4, min_p=0.4) == [0, 1, 2]
    # After top-k 2 the probabilities are 4/7 and 3/7: the first alone reaches 0.5.
    assert kept(top_k=2, top_p=0.5) == [0]


def test_frequencies_are_the_distributions(model):
    from v4jax.generate.sampling import choose_token

    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6)) * 2, jnp.float32)
    sampling = Sampling(temperature=0.7, top_k=4)
    n = 20000
    rows = jnp.broadcast_to(logits, (n, 6))
    token, score = jax.jit(lambda seed: choose_token(sampling, rows, seed, jnp.full(n, 17)))(
        jnp.arange(n, dtype=jnp.uint32)
    )
    expected = np.asarray(jax.nn.softmax(shaped_logits(sampling, logits))[0])
    # Four standard deviations of a frequency are at most 4 * 0.5 / sqrt(20000) = 0.0141.
    np.testing.assert_allclose(np.bincount(token, minlength=6) / n, expected, atol=0.0142)
    np.testing.assert_allclose(
        score, np.asarray(jax.nn.log_softmax(logits))[0][np.asarray(token)], atol=1e-5
    )


def test_stop_strings_and_streaming_hold_back_what_may_go():
    tokenizer, written = ByteTokenizer(), []
    stop = TextStop([tokenizer.eos_token_id], ["END", "\n\n"], tokenizer, written.append)
    text, tokens = "naïve E\nENDless", []
    for token in tokenizer.encode(text):
        tokens.append(token)
        if stop(0, tokens):
            break
    assert "".join(written) == stop.text(tokens) == "naïve E\n"
    assert "ï" in written, "half a character was written, or none"
    assert len(tokens) == len("naïve E\nEND".encode())
    other = TextStop([1], [], tokenizer, written.append)
    assert other(0, [*tokenizer.encode("a"), 1]) and other.text([*tokenizer.encode("a"), 1]) == "a"
    with pytest.raises(ValueError, match="tokenizer is not in use"):
        TextStop([1], ["x"])


@pytest.mark.parity
@pytest.mark.filterwarnings("default")  # torch and transformers warn about themselves
@pytest.mark.parametrize(
    "seed", [0, *[pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2)], 3]
)
def test_greedy_tokens_are_those_of_transformers(seed, tmp_path):
    import torch
    from transformers import DeepseekV4ForCausalLM

    patterns = [(0, 4, 128, 0), (128, 128, 4, 0), (0, 0, 4, 0), (128, 4, 4, 0)]
    cfg = small_config(**SMALL | dict(num_hidden_layers=3, compress_ratios=patterns[seed]))
    params = jax.tree.map(jnp.asarray, from_official(cfg, random_weights(cfg, seed)))
    v4jax.save_safetensors(cfg, params, tmp_path, dtype="float32")
    peer = DeepseekV4ForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for length in (1, 30, 120):
        prompt = np.random.default_rng(seed).integers(2, cfg.vocab_size, length)
        with torch.no_grad():
            theirs = peer.generate(
                torch.tensor(prompt[None]),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        (ours,) = generate(cfg, params, [prompt.tolist()], 24, stop=never)
        assert ours.tokens == theirs[0, length:].tolist()
