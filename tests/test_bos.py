"""Every way into a model begins with one bos, whether or not the text spells it out."""

import argparse
import json
import pathlib

import numpy as np
import pytest

from v4jax.chat.tokens import BOS, CHAT_TOKENS, EOS, FIM_BEGIN, FIM_TOKENS
from v4jax.data.config import DataConfig
from v4jax.data.pieces import open_pieces
from v4jax.data.store import open_store
from v4jax.generate import chat, command
from v4jax.tokenizer import ByteTokenizer, document_ids

CHAT = ByteTokenizer(CHAT_TOKENS + FIM_TOKENS)
PLAIN = [f"<｜User｜>{i}?<｜Assistant｜></think>{i}!" for i in range(9)]
TEMPLATED = [f"{BOS}{text}{EOS}" for text in PLAIN]


def records(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("fim_rate", [0.0, 1.0])
def test_records_of_templated_text_are_those_of_plain_text(tmp_path, fim_rate):
    found = []
    for name, texts in (("a.jsonl", TEMPLATED), ("b.jsonl", PLAIN)):
        path = str(records(tmp_path / name, texts))
        cfg = DataConfig(source=path, format="jsonl", tokenizer="byte-chat", fim_rate=fim_rate)
        found.append(open_store(cfg, cfg.sources[0], CHAT))
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
    assert (found[0].tokens == 0).sum() == (found[0].tokens == 1).sum() == len(PLAIN)
    assert (CHAT.encode(FIM_BEGIN)[0] in found[0].tokens) == (fim_rate == 1)


def test_files_of_templated_text_are_those_of_plain_text(tmp_path):
    found = []
    for folder, texts in ((tmp_path / "a", TEMPLATED), (tmp_path / "b", PLAIN)):
        folder.mkdir()
        for i, text in enumerate(texts):
            (folder / f"{i}.txt").write_text(text)
        cfg = DataConfig(source=str(folder), tokenizer="byte-chat")
        pieces, _ = open_pieces(cfg, cfg.sources[0], CHAT, 64, "all")
        found.append([pieces[i]["tokens"].tolist() for i in range(len(pieces))])
    assert found[0] == found[1] == [[0, *CHAT.encode(text), 1] for text in PLAIN]


@pytest.mark.parametrize(
    "text", [f"\n {BOS}a{EOS}\n", f"{BOS} \n{BOS}a{EOS}", f"{BOS}a{EOS} {EOS}\n\n"]
)
def test_white_space_outside_of_bos_and_eos_does_not_hide_them(text):
    assert document_ids(CHAT, text) == [0, *CHAT.encode("a"), 1]
    assert document_ids(CHAT, f" a\n{text[0]}") == [0, *CHAT.encode(f" a\n{text[0]}"), 1]


@pytest.mark.parametrize("form", ["text", "text in memory", "jsonl"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, form):
    suffix = "jsonl" if form == "jsonl" else "txt"
    found = []
    for mark in (b"", b"\xef\xbb\xbf"):
        folder = tmp_path / str(len(mark))
        folder.mkdir()
        for i in range(2):
            text = f"{i} \ufeffa"
            inner = json.dumps({"text": text}) if form == "jsonl" else text
            (folder / f"{i}.{suffix}").write_bytes(mark + inner.encode())
        packing = "split" if form == "text" else "best_fit"
        cfg = DataConfig(source=str(folder), format=form.split()[0], packing=packing)
        pieces, _ = open_pieces(cfg, cfg.sources[0], ByteTokenizer(), 64, "all")
        found.append([pieces[i]["tokens"].tolist() for i in range(len(pieces))])
    assert found[0] == found[1] and found[0][0] == document_ids(ByteTokenizer(), "0 \ufeffa")


def test_prompts_begin_with_one_bos(tmp_path):
    CHAT.save(tmp_path)
    for prompt in (PLAIN[0], BOS + PLAIN[0]):
        flags = argparse.Namespace(prompt=prompt, tokens=None, checkpoint=str(tmp_path))
        assert command._read_prompt(flags)[1] == [0, *CHAT.encode(PLAIN[0])]
    flags = argparse.Namespace(thinking="chat", effort=None, release="v4")
    ids = chat._ids(flags, CHAT, [{"role": "user", "content": "0?"}])
    assert ids == [0, *CHAT.encode("<｜User｜>0?<｜Assistant｜></think>")]


def test_only_the_tokenizers_room_adds_bos():
    package = pathlib.Path(__file__).parent.parent / "v4jax"
    files = [path for path in package.rglob("*.py") if ".bos_token_id" in path.read_text()]
    others = {path.name for path in files if path.parent.name != "tokenizer"}
    assert others == {
        "model.py",
        "validation.py",
        "config_json.py",
    }  # these keep, check and write it
