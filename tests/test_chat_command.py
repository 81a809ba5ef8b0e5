"""`v4jax chat`: the released encoding, a cache reused while text grows, bad input in one line."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.weights import random_weights
from trees import small_config

import v4jax
from v4jax.api import place_on
from v4jax.cache.layer import SPARE_ROWS
from v4jax.chat.encoding import encode_messages
from v4jax.chat.tokens import CHAT_TOKENS, EOS
from v4jax.checkpoint.names import from_official
from v4jax.cli import main as cli
from v4jax.generate import chat, steps
from v4jax.generate.decode import Completion, generate
from v4jax.generate.row import Row
from v4jax.generate.steps import DecodeConfig
from v4jax.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer(CHAT_TOKENS)
CFG = small_config(
    vocab_size=TOKENIZER.vocab_size,
    compress_ratios=(4, 128, 0),
    num_hidden_layers=2,
    num_hash_layers=1,
    index_topk=8,
    hidden_size=32,
    moe_intermediate_size=16,
    num_nextn_predict_layers=1,
)
ROOM = 256
FIRST = "v4jax: chat of release v4 (config.json: no dspark_* keys), "
"""The first line of a chat, up to how it thinks."""


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """One program for prompts of any length."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "PREFILL_CHUNK", 8)
        yield


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(jnp.asarray, from_official(CFG, random_weights(CFG, 0)))


@pytest.fixture(scope="module")
def checkpoint(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    v4jax.save_safetensors(CFG, params, folder, dtype="float32")
    TOKENIZER.save(folder)
    return folder


def never(*_):
    return False


def talk(monkeypatch, text, *flags):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return cli.main(["chat", *map(str, flags)])


class Script:
    """Stands for a Row: answers with given texts, and keeps the prompts."""

    def __init__(self, *texts):
        self.texts, self.prompts = list(texts), []

    def __call__(self, *_):
        return self

    def answer(self, prompt, max_new_tokens, seed, stop):
        self.prompts.append(prompt)
        tokens = []
        for token in TOKENIZER.encode(self.texts.pop(0)):
            tokens.append(token)
            if stop(0, tokens):
                break
        return Completion(tokens, [0.0] * len(tokens), "stop")


def test_a_kept_row_answers_as_a_fresh_one(params):
    """The text grows, loses a few tokens twice, and begins anew.

    Rings must not be trusted beyond what they still hold.
    """
    rng = np.random.default_rng(0)
    row = Row(CFG, params, DecodeConfig(), ROOM)

    def check(prompt, known):
        assert row.known(prompt) == known
        got = row.answer(prompt, 3, 0, never)
        (expected,) = generate(CFG, params, [prompt], 3, stop=never, capacity=ROOM)
        assert got.tokens == expected.tokens
        np.testing.assert_allclose(
            got.log_probs, expected.log_probs, atol=2e-4
        )  # as logits of a cache, issue 6
        assert row.tokens == prompt + got.tokens[:-1]

    first = rng.integers(2, 258, 126).tolist()
    check(first, 0)
    check(row.tokens + [5, 6, 7, 8, 9], len(row.tokens))  # now past a window of 128
    kept = len(row.tokens)
    check(row.tokens[: kept - SPARE_ROWS] + [99], kept - SPARE_ROWS)
    assert len(row.tokens) < kept
    check(row.tokens[:-SPARE_ROWS] + [98], 0)  # would be beyond what was ever written
    check(row.tokens, len(row.tokens) - 1)
    check([3] + row.tokens[1:], 0)


@pytest.mark.slow
def test_a_row_on_a_mesh(params):
    mesh, rules = place_on("data=2", None)
    with jax.set_mesh(mesh):
        row = Row(CFG, params, DecodeConfig(rules=rules), ROOM)
        first = row.answer([0, 5, 6], 3, 0, never)
        prompt = [0, 5, 6, *first.tokens, 9]
        assert row.known(prompt) == 5
        again = row.answer(prompt, 3, 0, never)
        (expected,) = generate(
            CFG, params, [prompt], 3, stop=never, capacity=ROOM, decoding=DecodeConfig(rules=rules)
        )
    assert again.tokens == expected.tokens


def test_an_untrained_model_is_listened_to_politely(checkpoint, params, monkeypatch, capsys):
    """The model's answers do not parse; the second turn has them as text.

    The third turn does not fit, and the end is no failure.
    """
    flags = (checkpoint, "--max-new-tokens", 12, "--cache-tokens", 140, "--system", "S", "--json")
    assert talk(monkeypatch, "hi\n\nagain\n" + 140 * "x" + "\n", *flags) == 0
    out, err = capsys.readouterr()
    messages = json.loads(out)["messages"]
    assert [message["role"] for message in messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert [messages[1]["content"], messages[3]["content"]] == ["hi", "again"]
    assert err.count("kept as plain text: answer:") == 2
    assert "this turn is left out: prompt of" in err and "the cache, which has room for 140" in err
    assert len(err.splitlines()) == 4 and err.startswith(FIRST + "no thinking\n")
    prompt = TOKENIZER.encode(encode_messages(messages[:4]))
    (expected,) = generate(CFG, params, [prompt], 12, capacity=ROOM)
    assert (
        chat._AllText(TOKENIZER).decode(expected.tokens).removesuffix(EOS) == messages[4]["content"]
    )


def test_thinking_is_marked_off_and_dropped_from_earlier_turns(checkpoint, monkeypatch, capsys):
    script = Script("Easy.</think>4" + EOS, "Hm.</think>naïve" + EOS)
    monkeypatch.setattr(chat, "Row", script)
    assert (
        talk(
            monkeypatch,
            "2+2?\nwhat?\n",
            checkpoint,
            "--thinking",
            "thinking",
            "--effort",
            "max",
            "--system",
            "S",
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert (out, err) == (
        "[reasoning]\nEasy.\n[answer]\n4\n[reasoning]\nHm.\n[answer]\nnaïve\n",
        f"{FIRST}thinking, effort max\n",
    )
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "Easy."},
        {"role": "user", "content": "what?"},
    ]
    for prompt, given in zip(script.prompts, (turns[:2], turns), strict=True):
        assert prompt == TOKENIZER.encode(
            encode_messages(given, "thinking", reasoning_effort="max")
        )
    assert not any(
        TOKENIZER.encode("Easy.") == script.prompts[1][i : i + 5]
        for i in range(len(script.prompts[1]))
    )


def test_what_does_not_parse_is_kept_as_it_stands(checkpoint, monkeypatch, capsys):
    """Special tokens are shown, and written to the history.

    So its ids are those that the cache holds.
    """
    script = Script("a<think>b" + EOS, "fine" + EOS)
    monkeypatch.setattr(chat, "Row", script)
    assert talk(monkeypatch, "x\ny", checkpoint) == 0
    out, err = capsys.readouterr()
    assert out == "a<think>b\nfine\n"
    said = "v4jax: kept as plain text: answer: got special token <think> inside its text\n"
    assert err == f"{FIRST}no thinking\n{said}"
    assert script.prompts[1][: len(script.prompts[0])] == script.prompts[0]
    assert script.prompts[1][len(script.prompts[0]) :][:4] == TOKENIZER.encode("a<think>b" + EOS)


@pytest.mark.parametrize(
    "flags, said",
    [
        ("{ckpt} --top-p 0.5", "temperature 0, which takes the likeliest token"),
        ("{ckpt} --effort max", "only --thinking thinking has an effort"),
        (
            "{ckpt} --thinking thinking --effort low",
            "reasoning_effort: got 'low'; allowed: None, high, max",
        ),
        ("{ckpt} --thinking loud", "invalid choice: 'loud'"),
        ("{ckpt} --max-new-tokens 9 --cache-tokens 8", "the cache, which has room for 8"),
        ("{ckpt} --cache official", "cache: got 'official' with quant 'none'"),
        ("{ckpt} --seed -1", "seeds: got"),
        ("{bare}", "tokenizer.json"),
        ("{plain}", "has no token <｜begin▁of▁sentence｜>, which a chat needs"),
        ("{ckpt}/nothing", "no such folder"),
    ],
)
def test_bad_input_is_one_line(flags, said, checkpoint, tmp_path, monkeypatch, capsys):
    for name, tokenizer in (("bare", None), ("plain", ByteTokenizer())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((checkpoint / "config.json").read_text())
        if tokenizer:
            tokenizer.save(tmp_path / name)
    line = flags.format(ckpt=checkpoint, bare=tmp_path / "bare", plain=tmp_path / "plain")
    assert talk(monkeypatch, "hi\n", *line.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and len(err.splitlines()) == 1
