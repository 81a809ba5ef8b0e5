"""Claims about resuming with the same data: what is noted, what is refused, what is allowed."""

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib

import pytest
from trees import small_config

from v4jax.chat.tokens import CHAT_TOKENS, FIM_TOKENS
from v4jax.data import listing, store, token_cache, tokenised
from v4jax.data.config import DataConfig, Source
from v4jax.data.identity import differences, evaluation_differences, settings_of
from v4jax.data.listing import Listings
from v4jax.data.pieces import open_pieces
from v4jax.data.store import open_store, prepare_cache
from v4jax.data.summary import unread_lines, unused_lines
from v4jax.tokenizer import EOS_TOKEN, ByteTokenizer, HuggingFaceTokenizer
from v4jax.train.config import TrainConfig
from v4jax.train.data import held_out_sets, train_batches
from v4jax.train.same_data import _changes

BYTES, CHAT = ByteTokenizer(), ByteTokenizer(CHAT_TOKENS + FIM_TOKENS)
SIZES = dict(seq_len=32, batch_size=2, vocab_size=400)
RUN = dict(run_dir="r", steps=2, batch_size=2, seq_len=32, learning_rate=1e-3, warmup_steps=1)
OLD = ("documents", "tokenizer", "seed", "seq_len", "batch_size")
"""The settings of checkpoints from before files were noted."""


def through_json(value):
    return json.loads(json.dumps(value))


def settings(cfg, tokenizer=BYTES, seq_len=32, batch_size=2):
    return through_json(settings_of(cfg, tokenizer, seq_len, batch_size))


def state_of(cfg, tokenizer=BYTES):
    return through_json(train_batches(cfg, tokenizer, **SIZES).get_state())


def edit(path: pathlib.Path, old: bytes, new: bytes) -> None:
    """Changes a file at equal size and time."""
    before = path.stat()
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(6):
        (tmp_path / "text" / f"{i}.txt").write_text(f"document {i}: the cat sat on the mat")
    return tmp_path / "text"


@pytest.fixture
def records(tmp_path):
    (tmp_path / "r").mkdir()
    for name in "ab":
        texts = [{"text": f"{name}{i} the cat sat", "more": "x"} for i in range(9)]
        (tmp_path / "r" / f"{name}.jsonl").write_text(
            "".join(json.dumps(text) + "\n" for text in texts)
        )
    return tmp_path / "r"


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, name, values",
    [
        (dict(packing="best_fit"), "packing", "split, this run has best_fit"),
        (dict(fim_rate=0.5), "fim_rate", "0.0, this run has 0.5"),
        (dict(held_out=0.4), "held_out", "0.2, this run has 0.4"),
        (dict(seed=1), "seed", "0, this run has 1"),
        (dict(column="more"), "columns", r"\['text'\], this run has \['more'\]"),
        (dict(glob="a*"), "r/b.jsonl", r"\d+ bytes \w+, this run has no such file"),
    ],
)
def test_another_setting_is_refused_by_its_name_with_both_values_either_way(
    records, change, name, values
):
    cfg = DataConfig(source=str(records), format="jsonl", held_out=0.2)
    other = dataclasses.replace(cfg, **change)
    ours, theirs = train_batches(cfg, CHAT, **SIZES), train_batches(other, CHAT, **SIZES)
    with pytest.raises(
        ValueError, match=f"^data position: was saved with {name} {values}; only the same can go on"
    ):
        theirs.set_state(through_json(ours.get_state()))
    with pytest.raises(ValueError, match=f"^data position: was saved with {name} "):
        ours.set_state(through_json(theirs.get_state()))


def test_chat_settings_matter_where_there_are_conversations(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    cfg = DataConfig(source=str(tmp_path), format="chat", column="messages", packing="best_fit")
    last = dataclasses.replace(cfg, chat=dataclasses.replace(cfg.chat, train_on="last"))
    (found,) = differences(settings(cfg), settings(last))
    assert str(found) == "was saved with chat.train_on all, this run has last"
    lines = [dataclasses.replace(one, format="jsonl") for one in (cfg, last)]
    assert differences(*map(settings, lines)) == []


def test_more_or_fewer_sources_are_a_difference(records):
    one, two = (
        Source(path=str(records / "a.jsonl"), format="jsonl"),
        Source(path=str(records / "b.jsonl"), format="jsonl"),
    )
    found = differences(
        settings(DataConfig(mixture=(one,))), settings(DataConfig(mixture=(one, two)))
    )
    assert str(found[0]) == "was saved with weights [1.0], this run has [1.0, 1.0]"


def test_another_tokenizer_of_the_same_size_is_a_difference(folder):
    other = ByteTokenizer([name + "x" for name in CHAT_TOKENS + FIM_TOKENS])
    cfg = DataConfig(source=str(folder))
    (found,) = differences(settings(cfg, CHAT), settings(cfg, other))
    assert found[:3] == ("tokenizer content", CHAT.fingerprint, other.fingerprint)


def test_a_tokenizer_with_another_end_of_text_is_another(tmp_path):
    pytest.importorskip("tokenizers")
    CHAT.save(tmp_path)
    usual = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    assert (
        usual.fingerprint == hashlib.sha256(usual.json_text.encode()).hexdigest()[:16]
    )  # caches go by it
    path = tmp_path / "tokenizer_config.json"
    path.write_text(path.read_text().replace(EOS_TOKEN, CHAT_TOKENS[0]))
    other = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    assert other.eos_token_id != usual.eos_token_id and other.fingerprint != usual.fingerprint


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("form", ["text", "jsonl", "jsonl.gz"])
def test_a_text_edited_at_equal_size_and_time_is_a_difference(
    folder, records, tmp_path, form, cached
):
    root, name = (folder, "3.txt") if form == "text" else (records, "a.jsonl")
    if form == "jsonl.gz":
        data = gzip.compress((root / name).read_bytes(), 0)
        (root / name).unlink()
        name += ".gz"
        (root / name).write_bytes(data)
    cfg = DataConfig(
        source=str(root),
        format=form.partition(".")[0],
        cache=str(tmp_path / "cache") if cached else "",
    )
    state = state_of(cfg)
    if form == "jsonl.gz":
        before = (root / name).stat()
        (root / name).write_bytes(gzip.compress(gzip.decompress(data).replace(b"cat", b"dog"), 0))
        os.utime(root / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        edit(root / name, b"cat", b"dog")
    with pytest.raises(
        ValueError,
        match=rf"saved with {root.name}/{name} (\d+) bytes \w+, this run has \1 bytes \w+; only",
    ):
        train_batches(cfg, BYTES, **SIZES).set_state(state)


def test_an_edit_between_the_samples_is_a_difference_too(folder, records):
    """Samples are cheap checks before anything is read; what is read anyway is checked whole."""
    (folder / "big.txt").write_text("x" * 300_000 + "cat" + "y" * 700_000)
    lines = [json.dumps({"text": "x" * 300_000 + "cat"}), json.dumps({"text": "y" * 700_000})]
    (records / "c.jsonl").write_text("\n".join(lines))
    for path, form in ((folder / "big.txt", "text"), (records / "c.jsonl", "jsonl")):
        cfg = DataConfig(source=str(path.parent), format=form)
        state, sampled = state_of(cfg), settings(cfg)
        before = path.stat().st_mtime_ns
        edit(path, b"cat", b"dog")
        os.utime(path, ns=(before + 1, before + 1))
        assert differences(sampled, settings(cfg)) == []
        with pytest.raises(ValueError, match="data position: was saved with (content|documents) "):
            train_batches(cfg, BYTES, **SIZES).set_state(state)


def test_a_corpus_may_move_and_a_file_of_it_may_not(folder, records, tmp_path):
    one = DataConfig(source=str(records / "a.jsonl"), format="jsonl")
    text, lines = DataConfig(source=str(folder)), DataConfig(source=str(records), format="jsonl")
    states = [state_of(cfg) for cfg in (text, lines, one)]
    (tmp_path / "elsewhere").mkdir()
    folder.rename(tmp_path / "elsewhere" / "t")
    records.rename(tmp_path / "elsewhere" / "lines")
    there = [tmp_path / "elsewhere" / name for name in ("t", "lines", "lines/a.jsonl")]
    moved = [
        dataclasses.replace(cfg, source=str(path))
        for cfg, path in zip((text, lines, one), there, strict=True)
    ]
    for cfg, state in zip(moved, states, strict=True):
        train_batches(cfg, BYTES, **SIZES).set_state(state)
    (there[1] / "a.jsonl").rename(there[1] / "c.jsonl")
    with pytest.raises(
        ValueError, match=r"was saved with lines/a.jsonl \d+ bytes \w+, this run has no such file"
    ):
        train_batches(moved[1], BYTES, **SIZES).set_state(states[1])


def test_many_files_are_noted_as_one(folder, monkeypatch):
    monkeypatch.setattr(listing, "_LISTED", 3)
    cfg = DataConfig(source=str(folder))
    before = settings(cfg)
    assert before["files"][0]["listed"] == {}
    edit(folder / "3.txt", b"cat", b"dog")
    (found,) = differences(before, settings(cfg))
    assert found.name == "files of text" and "6 with digest" in found.was and found.was != found.now


def test_a_cache_of_files_edited_at_equal_size_and_time_is_made_again(records, tmp_path, capsys):
    cfg = DataConfig(source=str(records), format="jsonl", cache=str(tmp_path / "cache"))
    first = open_store(cfg, cfg.sources[0], BYTES)
    edit(records / "a.jsonl", b"cat", b"dog")
    again = open_store(cfg, cfg.sources[0], BYTES)
    assert b"dog" in BYTES.decode(again.tokens).encode() and again.fingerprint != first.fingerprint
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is outdated (files of" in said and "made again" in said
    folder, aside = sorted((tmp_path / "cache").iterdir())
    assert aside.name == f"{folder.name}.outdated"
    (folder / "sources.json").unlink()  # as in caches from before there was this file
    sums = json.loads((folder / "checksums.json").read_text())
    (folder / "checksums.json").write_text(
        json.dumps({name: one for name, one in sums.items() if name != "sources.json"})
    )
    assert (
        open_store(cfg, cfg.sources[0], BYTES).fingerprint == again.fingerprint
        and capsys.readouterr().err == ""
    )


def test_tokens_in_memory_of_a_file_edited_at_equal_size_and_time_are_made_again(records):
    cfg = DataConfig(source=str(records), format="jsonl")
    first = open_store(cfg, cfg.sources[0], BYTES)
    edit(records / "a.jsonl", b"cat", b"dog")
    again = open_store(cfg, cfg.sources[0], BYTES)
    assert "dog" in BYTES.decode(again.tokens) and "dog" not in BYTES.decode(first.tokens)


def test_two_jobs_that_find_a_cache_outdated_keep_the_new_one(
    records, tmp_path, capsys, monkeypatch
):
    """The slower process puts nothing aside, whether the new cache is there already or not yet."""
    cfg = DataConfig(source=str(records), format="jsonl", cache=str(tmp_path / "cache"))
    open_store(cfg, cfg.sources[0], BYTES)
    edit(records / "a.jsonl", b"cat", b"dog")
    (folder,) = (tmp_path / "cache").iterdir()
    real, faster = store.put_aside, []

    def late(*args):
        if not faster:
            faster.append(True)
            faster.append(open_store(cfg, cfg.sources[0], BYTES))
        real(*args)

    monkeypatch.setattr(store, "put_aside", late)
    ours = open_store(cfg, cfg.sources[0], BYTES)
    assert ours.fingerprint == faster[1].fingerprint
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [
        folder.name,
        f"{folder.name}.outdated",
    ]
    assert capsys.readouterr().err.count("made again") == 1
    fault = token_cache.fault_in(folder, Listings()[cfg.sources[0]])
    assert fault is None
    real(
        tmp_path / "cache" / "gone", token_cache._Fault("damaged", "x"), Listings()[cfg.sources[0]]
    )


# ---- one reading for a run -----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "jsonl", "cache"])
def test_a_run_looks_up_samples_and_reads_its_files_once(records, tmp_path, monkeypatch, form):
    """Each file is hashed once, whatever opens it.

    Settings, the cache, each stage's batches, evaluation and the printed lines do.
    """
    calls = []
    for module, name in (
        (listing, "find_files"),
        (listing, "_mark"),
        (listing, "read_documents"),
        (token_cache, "damage"),
        (tokenised, "_tokenised"),
    ):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, real=real, name=name: [calls.append(name), real(*args)][1]
        )
    source = Source(path=str(records), format="text" if form == "text" else "jsonl", name="x")
    cached = str(tmp_path / "cache") if form == "cache" else ""
    cfg = DataConfig(mixture=(source,), cache=cached, held_out=0.3)
    if form == "cache":
        prepare_cache(cfg, BYTES)
        calls.clear()
    listings = Listings()
    settings_of(cfg, BYTES, 32, 2, listings)
    unread_lines(cfg, listings)
    prepare_cache(cfg, BYTES, listings) if form == "cache" else None
    for seq_len in (32, 64):
        sizes = SIZES | {"seq_len": seq_len}
        next(train_batches(cfg, BYTES, **sizes, listings=listings))
        held_out_sets(cfg, BYTES, **sizes, listings=listings)
    unused_lines(cfg, BYTES, [32, 64], 32, listings)
    reads = {"text": ["read_documents"], "jsonl": ["_tokenised"], "cache": ["damage"]}[form]
    assert sorted(calls) == sorted(["find_files", "_mark", "_mark", *reads])


# ---- older checkpoints and evaluation ------------------------------------------------------------


def test_an_older_checkpoint_is_compared_by_what_it_has(folder):
    cfg = DataConfig(source=str(folder))
    state = state_of(cfg)
    state["settings"] = {name: state["settings"][name] for name in OLD}
    train_batches(cfg, BYTES, **SIZES).set_state(state)
    for change, words in (
        (dict(packing="best_fit"), "packing split"),
        (dict(seed=2), "seed 0"),
        (dict(held_out=0.5), "documents "),
    ):
        with pytest.raises(ValueError, match=f"was saved with {words}"):
            train_batches(dataclasses.replace(cfg, **change), BYTES, **SIZES).set_state(state)


def older_mixture(tmp_path, text: str):
    """(config, state as an older v4jax saved it) of a text and conversations."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps({'messages': messages})}\n" * 4)
    lines = [json.dumps({"text": f"{i}{text}"}) for i in range(4)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    chat = Source(path=str(tmp_path / "chat.jsonl"), format="chat", column="messages")
    texts = Source(path=str(tmp_path / "text.jsonl"), format="jsonl")
    cfg = DataConfig(mixture=(texts, chat), packing="best_fit", tokenizer="byte-chat")
    state = state_of(cfg, CHAT)
    marks = [mark.split("-")[:2] for mark in state["settings"]["documents"].split()]
    older = {name: state["settings"][name] for name in OLD}
    older["documents"] = " ".join(map("-".join, marks))
    return cfg, state | {"settings": older | {"packing": "best_fit", "weights": [1.0, 1.0]}}


def test_an_older_mixture_goes_on_where_its_pieces_are_the_same(tmp_path):
    cfg, state = older_mixture(tmp_path, "x" * 40)
    train_batches(cfg, CHAT, **SIZES).set_state(state)


def test_an_older_mixture_whose_pieces_are_cut_otherwise_now_hears_why_and_how_to_go_on(tmp_path):
    """Each text is a row and a token long; the last token was a piece of its own."""
    cfg, state = older_mixture(tmp_path, "x" * (SIZES["seq_len"] + 1 - 3))
    ours = train_batches(cfg, CHAT, **SIZES).get_state()["settings"]
    pieces, _ = open_pieces(cfg, cfg.sources[0], CHAT, SIZES["seq_len"], "train")
    lone, documents = pieces.lone, ours["documents"]
    assert lone == len(pieces) == 3 and documents.split()[0].endswith("-3")
    refused = TrainConfig(model=small_config(vocab_size=400), data=cfg, **RUN)
    with pytest.raises(ValueError) as error:
        _changes(refused, state["settings"], ours)
    assert str(error.value) == (
        f"data position: was saved with documents {state['settings']['documents']}, this run has "
        f"{documents} (the documents are the same, but that version of v4jax also trained on "
        "conversations of which nothing is learned, and on last tokens that nothing predicts; this "
        "one leaves both out); only the same can go on (--data.allow-change: from a fresh position)"
    )


def test_an_older_checkpoint_whose_documents_changed_does_not_blame_the_version(tmp_path):
    cfg, state = older_mixture(tmp_path, "x" * 40)
    edit(tmp_path / "text.jsonl", b"xxx", b"yyy")
    with pytest.raises(ValueError, match=r"with documents [\w -]+, this run has [\w -]+; only"):
        train_batches(cfg, CHAT, **SIZES).set_state(state)


def test_a_set_to_evaluate_on_keeps_its_name_only_with_its_content(folder, records):
    a, b = (
        Source(path=str(records / f"{name}.jsonl"), format="jsonl", name="extra") for name in "ab"
    )
    none, first, other = (
        DataConfig(source=str(folder), evaluate_on=sets) for sets in ((), (a,), (b,))
    )
    (found,) = evaluation_differences(settings(first), settings(other))
    assert (
        str(found).startswith("was saved with evaluate_on extra ")
        and differences(settings(first), settings(other)) == []
    )
    column = DataConfig(source=str(folder), evaluate_on=(dataclasses.replace(a, column="more"),))
    (found,) = evaluation_differences(settings(first), settings(column))
    assert str(found) == "was saved with evaluate_on extra: column text, this run has more"
    assert (
        evaluation_differences(settings(none), settings(first))
        == evaluation_differences(settings(first), settings(none))
        == []
    )
