"""generation_config.json: its end tokens end rows, its values are defaults, flags win."""

import argparse
import io
import json

import jax
import numpy as np
import pytest
from exports import CFG, PARAMS, write
from trees import random_params, small_config

import v4jax
from v4jax.chat.tokens import CHAT_TOKENS, EOS
from v4jax.cli import main as cli
from v4jax.cli.commands import parser
from v4jax.cli.train import sample
from v4jax.convert.conversion import convert
from v4jax.generate import chat, command
from v4jax.generate.choice import cache_tokens, choice_of
from v4jax.generate.decode import Completion
from v4jax.generate.sampling import Sampling
from v4jax.generation_config import with_end_tokens
from v4jax.tokenizer import ByteTokenizer
from v4jax.tokenizer.checks import disagreement
from v4jax.train import loop, prepare
from v4jax.train.config import TrainConfig

TOKENIZER = ByteTokenizer(CHAT_TOKENS)
MODEL = small_config(
    vocab_size=TOKENIZER.vocab_size,
    compress_ratios=(4, 128, 0),
    num_hidden_layers=2,
    num_hash_layers=1,
    index_topk=8,
    hidden_size=32,
    moe_intermediate_size=16,
)


def flags_of(directory, *flags):
    return parser().parse_args(["generate", str(directory), "--tokens", "1", *flags])


def choice(tmp_path, file, *flags):
    """What a command does with a generation_config.json and flags."""
    (tmp_path / "generation_config.json").write_text(json.dumps(file))
    return choice_of(flags_of(tmp_path, *flags))


# ---- choosing tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "flags", "sampling"),
    [
        ({}, (), {}),
        ({"temperature": 0.6, "top_p": 0.95}, (), {"temperature": 0.6, "top_p": 0.95}),
        (
            {"do_sample": True, "temperature": 1, "top_k": 5, "min_p": 0.1},
            (),
            {"temperature": 1.0, "top_k": 5, "min_p": 0.1},
        ),
        ({"do_sample": True}, (), {"temperature": 1.0}),
        ({"do_sample": True, "temperature": None, "top_p": None}, (), {"temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.95}, (), {}),
        ({"temperature": 0, "top_p": 0.95}, (), {}),
        ({"top_p": 0.95}, (), {}),
        ({"temperature": 0.6, "top_p": 0.95}, ("--temperature", "0"), {}),
        (
            {"temperature": 0.6, "top_p": 0.95},
            ("--temperature", "2"),
            {"temperature": 2.0, "top_p": 0.95},
        ),
        ({"temperature": 0.6, "top_p": 0.95}, ("--top-p", "1"), {"temperature": 0.6}),
        (
            {"do_sample": False, "top_p": 0.5},
            ("--temperature", "2"),
            {"temperature": 2.0, "top_p": 0.5},
        ),
        (
            {},
            ("--temperature", "2", "--top-k", "3", "--min-p", "0.2"),
            {"temperature": 2.0, "top_k": 3, "min_p": 0.2},
        ),
    ],
)
def test_flags_win_over_the_file_and_the_file_over_the_likeliest(file, flags, sampling, tmp_path):
    assert choice(tmp_path, file, *flags).sampling == Sampling(**sampling)


def test_without_the_file_nothing_changes(tmp_path):
    found = choice_of(flags_of(tmp_path))
    assert found == (Sampling(), 64, False, "")
    assert choice_of(flags_of(tmp_path, "--max-new-tokens", "9")).max_new_tokens == 9


@pytest.mark.parametrize(
    ("file", "flags", "ends", "line"),
    [
        ({"_from_model_config": True, "pad_token_id": 2, "eos_token_id": 1}, (), (), ""),
        ({"transformers_version": "5.1", "use_cache": True, "num_beams": 1}, (), (), ""),
        ({"temperature": 0.6, "top_p": 0.95}, (), (), "temperature 0.6, top_p 0.95"),
        ({"temperature": 0.6, "top_p": 0.95}, ("--temperature", "0"), (), ""),
        ({"temperature": 0.6, "top_p": 0.95}, ("--temperature", "1"), (), "top_p 0.95"),
        ({"do_sample": False, "temperature": 0.6}, (), (), "temperature 0 (do_sample is false)"),
        ({"do_sample": True}, (), (7, 9), "temperature 1, rows also end at 7, 9"),
        ({"max_new_tokens": 5}, (), (), "max_new_tokens 5, or what there is room for"),
        ({"max_new_tokens": 5}, ("--max-new-tokens", "6"), (), ""),
        (
            {"temperature": 1, "repetition_penalty": 1.1, "max_length": 20, "top_k": 4},
            (),
            (),
            "temperature 1, top_k 4; not used: repetition_penalty 1.1, max_length 20",
        ),
        ({"stop_strings": ["x"]}, (), (), "not used: stop_strings ['x']"),
    ],
)
def test_the_line_says_what_counts_of_the_file_and_what_does_not(file, flags, ends, line, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps(file))
    assert choice_of(flags_of(tmp_path, *flags), ends).line == (
        f"generation_config.json: {line}" if line else ""
    )


def test_a_limit_of_the_file_gives_way_and_one_of_a_flag_does_not(tmp_path):
    filed, flagged = (
        choice(tmp_path, {"max_new_tokens": 50}),
        choice(tmp_path, {"max_new_tokens": 50}, "--max-new-tokens", "60"),
    )
    assert [filed.new_tokens(10, capacity) for capacity in (100, 60, 59, 12, 10)] == [
        50,
        50,
        49,
        2,
        1,
    ]
    assert [flagged.new_tokens(10, capacity) for capacity in (100, 60)] == [60, 60]


LONG = MODEL.replace(max_position_embeddings=2**20)


@pytest.mark.parametrize(
    ("flags", "prompt", "new"),
    [
        ((), 10, 4086),  # as a chat's cache
        ((), 5000, 64),  # the command's own default
        (("--cache-tokens", "50000"), 10, 49990),
        (("--max-new-tokens", "20000"), 10, 20000),
        (("--cache-tokens", "500000"), 10, 393216),
    ],
)
def test_a_limit_made_for_a_server_sizes_no_cache(tmp_path, flags, prompt, new):
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 393216}')
    given = flags_of(tmp_path, *flags)
    assert choice_of(given).new_tokens(prompt, cache_tokens(given, LONG, prompt)) == new
    short = MODEL.replace(max_position_embeddings=256)
    assert cache_tokens(flags_of(tmp_path), short, prompt) == 256


BAD = [
    ({"temperature": -1}, "temperature: got -1; must be 0"),
    ({"temperature": float("nan")}, "temperature: got nan"),
    ({"temperature": "0.6"}, "temperature: got '0.6'; must be a number"),
    ({"temperature": True}, "temperature: got True; must be a number"),
    ({"do_sample": False, "temperature": -1}, "temperature: got -1"),
    ({"do_sample": "yes"}, "do_sample: got 'yes'; must be true or false"),
    ({"top_p": 1.5}, "top_p: got 1.5; must be in (0, 1]"),
    ({"top_p": 0}, "top_p: got 0; must be in (0, 1]"),
    ({"top_k": -1}, "top_k: got -1; must be an integer"),
    ({"top_k": 2.5}, "top_k: got 2.5"),
    ({"min_p": 2}, "min_p: got 2; must be in [0, 1]"),
    ({"max_new_tokens": 0}, "max_new_tokens: got 0; must be an integer of at least 1"),
    ({"max_new_tokens": True}, "max_new_tokens: got True"),
    ({"eos_token_id": 97}, "eos_token_id: got 97; must be in [0, vocab_size=97)"),
    ({"eos_token_id": [1, "x"]}, "eos_token_id: got 'x'"),
    ([1], "expected a JSON object, got list"),
    ("{", "not JSON"),
]


@pytest.mark.parametrize(("file", "words"), BAD, ids=[words for _, words in BAD])
def test_a_bad_file_is_refused_in_one_line_before_the_weights_are_read(
    file, words, tmp_path, monkeypatch, capsys
):
    (tmp_path / "config.json").write_text(json.dumps(CFG.to_dict()))
    (tmp_path / "generation_config.json").write_text(
        file if isinstance(file, str) else json.dumps(file)
    )
    monkeypatch.setattr(command, "load", lambda *_: pytest.fail("the weights were read"))
    assert cli.main(["generate", str(tmp_path), "--tokens", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"v4jax: {tmp_path}/generation_config.json: ") and words in err


def test_flags_do_not_make_a_bad_file_good(tmp_path):
    with pytest.raises(ValueError, match="generation_config.json: top_p: got 7"):
        choice(tmp_path, {"top_p": 7}, "--top-p", "0.5")


def test_the_help_says_where_defaults_come_from():
    (commands,) = [a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)]
    for name in ("generate", "chat"):
        texts = {action.dest: action.help for action in commands.choices[name]._actions}
        for flag in ("temperature", "top_p", "top_k", "min_p", "max_new_tokens"):
            assert "(default: the checkpoint's generation_config.json, else " in texts[flag]
        assert "else 0)" in texts["temperature"]


# ---- end tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "file", "ids"),
    [
        (1, None, (1,)),
        (1, 7, (1, 7)),
        ([1, 7], [9, 7, 1], (1, 7, 9)),
        ([1, 7], 1, (1, 7)),
        (1, [], (1,)),
        (None, [7, 5], (7, 5)),
        (None, None, ()),
    ],
)
def test_both_files_count(config, file, ids, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CFG.to_dict() | {"eos_token_id": config}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": file}))
    assert with_end_tokens(v4jax.ModelConfig.from_json(tmp_path), tmp_path).eos_token_ids == ids


@pytest.mark.parametrize(("said", "ids"), [([6, 5, 6], (6, 5, 9)), (None, (5, 9))])
def test_exports_and_conversions_say_what_their_source_said(said, ids, tmp_path):
    source = write(tmp_path / "in", raw=CFG.to_dict() | {"eos_token_id": said, "pad_token_id": 2})
    (source / "generation_config.json").write_text('{"eos_token_id": [5, 9], "top_p": 0.5}')
    convert(source, tmp_path / "store", format="orbax")
    convert(tmp_path / "store", tmp_path / "back")
    loaded, params = v4jax.load(source)
    v4jax.save_safetensors(
        loaded, params, tmp_path / "alone"
    )  # which has no generation_config.json
    assert (
        v4jax.ModelConfig.from_json(tmp_path / "alone").eos_token_ids == loaded.eos_token_ids == ids
    )
    v4jax.save_safetensors(loaded, params, tmp_path / "saved", source=source)
    for name in ("store", "back", "saved"):
        raw = json.loads((tmp_path / name / "config.json").read_text())
        assert (raw["eos_token_id"], raw["pad_token_id"]) == (said, 2), name
        assert (tmp_path / name / "generation_config.json").read_text() == (
            source / "generation_config.json"
        ).read_text()


def test_an_export_ends_where_its_source_and_its_config_end(tmp_path):
    """A model written in Python knows one end token; what it was trained from may know more."""
    names = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    style = {"layer_types": [names[n] for n in (0, 0, 1, 2, 1, 2, 1)]}
    for raw in (CFG.to_dict(), CFG.to_dict() | style):
        source = write(tmp_path / f"in{len(raw)}", raw=raw | {"eos_token_id": [1, 7]})
        for n, (cfg, ends) in enumerate(
            [(CFG, [1, 7]), (CFG.replace(more_eos_token_ids=(9,)), [1, 7, 9])]
        ):
            v4jax.save_safetensors(cfg, PARAMS, source / f"out{n}", source=source)
            assert (
                json.loads((source / f"out{n}" / "config.json").read_text())["eos_token_id"] == ends
            )


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id"])
def test_a_special_token_that_only_one_of_both_has_makes_no_other_model(name, tmp_path):
    """The source's own keys stay, and the token is there."""
    source = write(tmp_path / "in", raw=CFG.to_dict() | {name: None, "pad_token_id": 2})
    v4jax.save_safetensors(CFG, PARAMS, tmp_path / "with", source=source)
    raw = json.loads((tmp_path / "with" / "config.json").read_text())
    own = getattr(CFG, name)
    assert raw["pad_token_id"] == 2 and raw[name] in (own, [own])
    assert v4jax.ModelConfig.from_dict(raw) == CFG
    other = write(tmp_path / "other", raw=CFG.to_dict() | {"pad_token_id": 2})
    v4jax.save_safetensors(CFG.replace(**{name: None}), PARAMS, tmp_path / "without", source=other)
    raw = json.loads((tmp_path / "without" / "config.json").read_text())
    assert raw["pad_token_id"] == 2 and v4jax.ModelConfig.from_dict(raw) == CFG


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model whose greedy text depends on its prompt, with the tokenizer of a chat."""
    folder = tmp_path_factory.mktemp("choice") / "model"
    params = jax.tree.map(
        lambda a: a if a.ndim < 2 or a.shape[-1] == 2 else a * np.float32(0.1), random_params(MODEL)
    )
    v4jax.save_safetensors(MODEL, params, folder, dtype="float32")
    TOKENIZER.save(folder)
    return folder


def test_generate_ends_at_all_of_them_and_shows_what_the_file_decides(
    checkpoint, tmp_path, monkeypatch, capsys
):
    text = "abcde"
    asked = []

    def generate(cfg, params, prompts, max_new_tokens, *, stop, decoding, **_):
        """Stands for the model: says `text`, until it is stopped."""
        asked.append((decoding.sampling, max_new_tokens))
        tokens = TOKENIZER.encode(text)
        end = next((n for n in range(1, len(tokens) + 1) if stop(0, tokens[:n])), None)
        return [
            Completion(tokens[:end], [0.0] * len(tokens[:end]), "length" if end is None else "stop")
        ]

    def run(*flags, **said):
        folder = tmp_path / f"m{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for path in checkpoint.iterdir():
            (folder / path.name).hardlink_to(path)
        for name, value in said.items():
            (folder / f"{name}.json").unlink(missing_ok=True)  # not the file that others have too
            (folder / f"{name}.json").write_text(json.dumps(value))
        assert cli.main(["generate", str(folder), "--prompt", "x", *flags]) == 0
        return capsys.readouterr()

    monkeypatch.setattr(command, "generate", generate)
    b, d = TOKENIZER.encode("bd")
    assert run() == ("xabcde\n", "")
    assert run(config=MODEL.to_dict() | {"eos_token_id": [1, d, b, d]}) == ("xa\n", "")
    line = "v4jax: generation_config.json: "
    said = {"eos_token_id": [1, d, b], "do_sample": False}
    assert run(generation_config=said) == (
        "xa\n",
        f"{line}temperature 0 (do_sample is false), rows also end at {d}, {b}\n",
    )
    assert run("--stop-tokens", f"{d}", generation_config={"eos_token_id": b}) == ("xabc\n", "")
    assert {sampling for sampling, _ in asked} == {Sampling()} and {
        max_new_tokens for _, max_new_tokens in asked
    } == {64}
    hot = {"temperature": 1.7, "top_k": 50, "max_new_tokens": 4}
    shown = run(generation_config=hot)
    assert shown == (
        "xabcde\n",
        f"{line}temperature 1.7, top_k 50, max_new_tokens 4, or what there is room for\n",
    )
    shown = run("--json", "--temperature", "0", generation_config=hot)
    assert json.loads(shown.out)["text"] == "abcde" and shown.err.startswith(
        f"{line}max_new_tokens 4"
    )
    assert asked[-2:] == [(Sampling(temperature=1.7, top_k=50), 4), (Sampling(), 4)]


def test_a_chat_ends_at_the_files_tokens_too_and_keeps_the_turn(
    checkpoint, monkeypatch, capsys, tmp_path
):
    """An answer that ends with another token than the format's still follows the format."""
    other, prompts, allowed = TOKENIZER.encode("~")[0], [], []

    class Script:
        def __init__(self, *_):
            pass

        def answer(self, prompt, max_new_tokens, seed, stop):
            prompts.append(prompt)
            allowed.append(max_new_tokens)
            tokens = TOKENIZER.encode("fine~" if len(prompts) == 1 else "well" + EOS)
            ends = [stop(0, tokens[: n + 1]) for n in range(len(tokens))]
            assert ends == [False] * (len(tokens) - 1) + [True]
            return Completion(tokens, [0.0] * len(tokens), "stop")

    for path in checkpoint.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, other], "max_new_tokens": 100})
    )
    monkeypatch.setattr(chat, "Row", Script)
    monkeypatch.setattr("sys.stdin", io.StringIO("x\ny\n"))
    assert cli.main(["chat", str(tmp_path), "--cache-tokens", "70"]) == 0
    out, err = capsys.readouterr()
    assert out == "fine\nwell\n"
    said = f"max_new_tokens 100, or what there is room for, rows also end at {other}"
    assert err.splitlines()[1:] == [f"v4jax: generation_config.json: {said}"]
    assert TOKENIZER.encode("fine" + EOS) == prompts[1][len(prompts[0]) :][:5]
    assert allowed == [70 - len(prompt) for prompt in prompts]


def test_the_sample_of_a_run_ends_at_them(tmp_path, monkeypatch):
    TOKENIZER.save(tmp_path)
    listed = MODEL.replace(more_eos_token_ids=tuple(TOKENIZER.encode("c")))
    completion = Completion(TOKENIZER.encode("abc"), [0.0] * 3, "stop")
    monkeypatch.setattr("v4jax.api.load", lambda *_, **__: (listed, None))
    monkeypatch.setattr("v4jax.generate.decode.generate", lambda *_, **__: [completion])
    cfg = TrainConfig(
        model=MODEL,
        run_dir=str(tmp_path),
        steps=1,
        batch_size=1,
        seq_len=8,
        learning_rate=1e-3,
        warmup_steps=0,
        sample_prompt="x",
        sample_tokens=3,
    )
    assert sample(cfg) == {"sample": "xab"}
    assert (tmp_path / "sample.txt").read_text() == "xab"


# ---- tokenizers that disagree --------------------------------------------------------------------


class Odd(ByteTokenizer):
    """Begins with 5 and ends with 6."""

    bos_token_id, eos_token_id = 5, 6


def test_special_tokens_that_disagree_are_named():
    assert disagreement(MODEL, TOKENIZER) == ""
    assert disagreement(MODEL.ending_at([6]).replace(bos_token_id=None), Odd()) == ""
    assert disagreement(MODEL, Odd()) == (
        "the tokenizer's end token is 6, but rows end at 1; "
        "the tokenizer's begin token is 5, but config.json has 0"
    )
    assert "but rows end at nothing" in disagreement(MODEL.replace(eos_token_id=None), Odd())


def test_generate_and_train_say_so_in_one_line(checkpoint, tmp_path, monkeypatch, capsys):
    def enough(*_):
        raise ValueError("enough")

    said = disagreement(MODEL, Odd())
    monkeypatch.setattr(command, "load_tokenizer", lambda _: Odd())
    monkeypatch.setattr(command, "load", enough)
    assert cli.main(["generate", str(checkpoint), "--prompt", "x"]) == 2
    assert capsys.readouterr().err == f"v4jax: {said}\nv4jax: enough\n"
    monkeypatch.setattr(prepare, "tokenizer_of", lambda _: Odd())
    cfg = TrainConfig(
        model=MODEL,
        run_dir=str(tmp_path / "run"),
        steps=1,
        batch_size=1,
        seq_len=8,
        learning_rate=1e-3,
        warmup_steps=0,
    )
    monkeypatch.setattr(loop, "state_shardings", enough)
    with pytest.raises(ValueError, match="enough"):
        loop.train(cfg)
    assert capsys.readouterr().err == f"v4jax: {said}\n"
