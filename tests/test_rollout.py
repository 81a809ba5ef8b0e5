"""Samples for reinforcement learning: log probabilities are those of the training forward.

A killed batch continues where it stopped.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.weights import random_weights
from test_generate import SMALL, cut
from trees import small_config

import v4jax
from v4jax.checkpoint.names import from_official
from v4jax.generate import rollout as module
from v4jax.generate.rollout import Plan, rollout
from v4jax.generate.sampling import Sampling
from v4jax.generate.steps import DecodeConfig

PROMPTS = [[3, 5, 7], [9], list(range(20, 31))]
PLAN = Plan(samples=2, max_new_tokens=10, rows=4, stop_tokens=(4,), seed=11)
WARM = DecodeConfig(sampling=Sampling(temperature=1.0))


@pytest.fixture(scope="module")
def model():
    cfg = small_config(
        **SMALL | dict(compress_ratios=(4, 128, 0), num_hidden_layers=2, num_hash_layers=0)
    )
    return cfg, jax.tree.map(jnp.asarray, from_official(cfg, random_weights(cfg, 0)))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The result of an uninterrupted batch, and its log."""
    log = tmp_path_factory.mktemp("rollout") / "log.jsonl"
    return rollout(*model, PROMPTS, PLAN, log, decoding=WARM), log


def test_log_probabilities_are_those_of_the_training_forward(model, whole):
    samples, _ = whole
    assert [len(own) for own in samples] == [2, 2, 2] and samples[0][0].tokens != samples[0][
        1
    ].tokens
    rows = np.zeros((6, 24), np.int32)
    flat = [
        (prompt, sample) for prompt, own in zip(PROMPTS, samples, strict=True) for sample in own
    ]
    for row, (prompt, sample) in zip(rows, flat, strict=True):
        row[: len(prompt) + len(sample.tokens)] = prompt + sample.tokens
    scores = np.asarray(jax.nn.log_softmax(v4jax.forward(*model, jnp.asarray(rows)).logits))
    for score, (prompt, sample) in zip(scores, flat, strict=True):
        n = len(sample.tokens)
        expected = score[len(prompt) - 1 :][np.arange(n), sample.tokens]
        np.testing.assert_allclose(
            sample.log_probs, expected, atol=2e-4
        )  # as logits of a cache, issue 6
        assert sample.ended == ("stop" if sample.tokens[-1] == 4 else "length") and (
            n == 10 or sample.ended == "stop"
        )


def test_samples_end_at_every_end_token_of_the_model(model, whole, tmp_path):
    cfg, params = model
    ends = (4, whole[0][0][0].tokens[2], cfg.eos_token_id)
    plan = dataclasses.replace(PLAN, stop_tokens=None)
    cfg = cfg.replace(more_eos_token_ids=ends[:2])
    samples = rollout(cfg, params, PROMPTS, plan, tmp_path / "log", decoding=WARM)
    for before, now in zip(sum(whole[0], []), sum(samples, []), strict=True):
        assert now.tokens == cut(before.tokens, ends)
        assert now.ended == ("stop" if now.tokens[-1] in ends else "length")
    assert len(samples[0][0].tokens) <= 3 < len(whole[0][0][0].tokens)


def test_an_interrupted_batch_goes_on_where_it_was(model, whole, tmp_path, monkeypatch):
    """The batch is killed at its 9th, then at its 5th line, each time with half a line written.

    Then it is read alone.
    """
    samples, _ = whole
    log, write, written = tmp_path / "runs" / "log.jsonl", module._Log.write, []

    def until(most):
        def one(self, job, tokens, scores):
            if len(written) == most:
                self._file.write(json.dumps([job, tokens, scores])[:-3].encode())
                raise KeyboardInterrupt
            written.append(job)
            write(self, job, tokens, scores)

        written.clear()
        return one

    total = sum(len(sample.tokens) for own in samples for sample in own)
    for most in (9, 5):
        monkeypatch.setattr(module._Log, "write", until(most))
        with pytest.raises(KeyboardInterrupt):
            rollout(*model, PROMPTS, PLAN, log, decoding=WARM)
    monkeypatch.setattr(module._Log, "write", until(-1))
    again = rollout(*model, PROMPTS, PLAN, log, decoding=WARM)
    assert len(written) == total - 9 - 5, "what was logged was computed again, or lost"
    for got, expected in zip(sum(again, []), sum(samples, []), strict=True):
        assert (got.tokens, got.ended) == (expected.tokens, expected.ended)
        np.testing.assert_allclose(got.log_probs, expected.log_probs, atol=2e-4)
    monkeypatch.setattr(module, "generate", None)
    assert rollout(*model, PROMPTS, PLAN, log, decoding=WARM) == again


def test_another_batch_is_refused(model, whole):
    _, log = whole
    for prompts, plan, decoding in (
        (PROMPTS[:2], PLAN, WARM),
        (PROMPTS, Plan(samples=2, max_new_tokens=11), WARM),
        (PROMPTS, PLAN, DecodeConfig()),
    ):
        with pytest.raises(ValueError, match="the log of another batch"):
            rollout(*model, prompts, plan, log, decoding=decoding)
    with pytest.raises(ValueError, match=r"stop_tokens: got id 97"):
        rollout(
            *model,
            PROMPTS,
            Plan(samples=1, max_new_tokens=1, stop_tokens=(97,)),
            log,
            decoding=WARM,
        )
    with pytest.raises(ValueError, match="rows: got 0; must be an integer of at least 1"):
        Plan(samples=1, max_new_tokens=1, rows=0)


def test_prompts_may_be_arrays(model, whole):
    samples, log = whole
    assert (
        rollout(*model, [np.array(prompt) for prompt in PROMPTS], PLAN, log, decoding=WARM)
        == samples
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"garbage", "Expecting value"),
        (b"\xff\x00", "line 2 is damaged"),
        (b"[99, [5], [-1.0]]", r"sample 99 of \d"),
        (b"[0, [999], [-1.0]]", "sample 0: got id 999"),
        (b"[0, [5], []]", "got 1 with 0 log probabilities"),
        (
            b"[0, " + str([5] * 99).encode() + b", " + str([-1.0] * 99).encode() + b"]",
            "got 99 with 99",
        ),
        (b"7", "line 2 is damaged"),
    ],
)
def test_a_damaged_log_is_refused_and_left_as_it_is(model, whole, tmp_path, line, words):
    head = whole[1].read_bytes().splitlines(keepends=True)[0]
    log = tmp_path / "log"
    log.write_bytes(head + line + b"\n")
    with pytest.raises(ValueError, match=words):
        rollout(*model, PROMPTS, PLAN, log, decoding=WARM)
    assert log.read_bytes() == head + line + b"\n"


def test_another_file_is_not_taken_for_a_log_cut_short(model, whole, tmp_path):
    notes = tmp_path / "notes"
    notes.write_bytes(b"my notes, one line without its end")
    with pytest.raises(ValueError, match="the log of another batch"):
        rollout(*model, PROMPTS, PLAN, notes, decoding=WARM)
    assert notes.read_bytes() == b"my notes, one line without its end"
