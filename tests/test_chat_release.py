"""Whose wording a checkpoint was trained on: flag, else encoder (never run), else config.json."""

import argparse
import dataclasses
import json

import pytest
from releases import ENCODERS, raw_config, trunk_config
from small_runs import small_run

from v4jax.chat.encoding import EFFORTS
from v4jax.chat.release import chat_release
from v4jax.chat.tokens import CHAT_TOKENS
from v4jax.data.config import ChatFormat, DataConfig
from v4jax.data.conversations import conversation_tokens
from v4jax.generate import chat
from v4jax.tokenizer import ByteTokenizer as Bytes
from v4jax.tokenizer.checks import IMAGE
from v4jax.train.prepare import with_chat_release


def checkpoint(folder, release="flash", encoder=None, **keys):
    raw = raw_config(release, trunk_config(release).to_dict()) | keys
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    if encoder is not None:
        (folder / "encoding").mkdir(exist_ok=True)
        (folder / "encoding/encoding_dsv4.py").write_bytes(encoder)
    return folder


@pytest.mark.parametrize(
    ("release", "encoder", "keys", "name", "why"),
    [
        ("flash", None, {}, "v4", "no dspark_* keys"),
        ("flash", ENCODERS["v4"], {}, "v4", "encoding/encoding_dsv4.py"),
        ("flash", ENCODERS["0731"], {}, "0731", "encoding/encoding_dsv4.py"),
        ("flash-0731", ENCODERS["0731"], {}, "0731", "encoding/encoding_dsv4.py"),
        # Flash-DSpark of June: the first release's trunk, the keys of the second.
        ("flash-0731", ENCODERS["v4"], {}, "v4", "encoding/encoding_dsv4.py"),
        ("flash-0731", None, {}, "0731", "Flash-DSpark has them too"),
        ("flash-vision-exp", None, {}, "0731", "vision_n_layers"),
        ("flash", b"# of another kind\n", {}, "v4", "no dspark_* keys"),
        ("flash", b"x = 'REASONING_EFFORT_PROMPTS'\n", {}, "v4", "no dspark_* keys"),
        ("flash", None, {"dsv4_reasoning_effort_profile": "official"}, "0731", "profile"),
        ("flash-0731", None, {"dsv4_reasoning_effort_profile": "preview"}, "v4", "profile"),
        ("flash", ENCODERS["v4"], {"dsv4_reasoning_effort_profile": "official"}, "v4", "encod"),
    ],
)
def test_the_encoder_decides_then_the_configuration(tmp_path, release, encoder, keys, name, why):
    found = chat_release(checkpoint(tmp_path / "c", release, encoder, **keys))
    assert found.name == name and why in found.why


def test_the_flag_goes_first(tmp_path):
    folder = checkpoint(tmp_path / "c", "flash-0731", ENCODERS["0731"])
    assert chat_release(folder, "v4") == ("v4", "as asked for")
    with pytest.raises(ValueError, match="release: got 'v5'; allowed: v4, 0731"):
        chat_release(folder, "v5")


def test_a_bad_profile_and_a_link_that_leads_out_are_refused(tmp_path):
    folder = checkpoint(tmp_path / "c", dsv4_reasoning_effort_profile="new")
    with pytest.raises(ValueError, match="profile: got 'new'; allowed: official, preview"):
        chat_release(folder)
    (folder / "encoding").mkdir()
    (tmp_path / "elsewhere.py").write_text("REASONING_EFFORT_MAX = 1")
    (folder / "encoding/encoding_dsv4.py").symlink_to(tmp_path / "elsewhere.py")
    with pytest.raises(ValueError, match="encoding_dsv4.py: is a link to .*, outside of"):
        chat_release(folder)


@pytest.mark.parametrize("encoder", [b"", "REASONING_EFFORT_MAX = 1".encode("utf-16")])
def test_an_encoder_that_tells_nothing_is_said(tmp_path, encoder):
    found = chat_release(checkpoint(tmp_path / "c", "flash-0731", encoder))
    assert found.name == "0731" and "encoding_dsv4.py defines no REASONING_EFFORT_" in found.why


def test_a_file_in_the_place_of_encoding_is_no_encoder(tmp_path):
    folder = checkpoint(tmp_path / "c", "flash")
    (folder / "encoding").write_text("")
    assert chat_release(folder).name == "v4"


class Stop(Exception):
    pass


@pytest.mark.parametrize(("encoder", "effort"), [("v4", "max"), ("0731", "low")])
def test_chat_says_the_release_first(tmp_path, monkeypatch, capsys, encoder, effort):
    folder = checkpoint(tmp_path / "c", "flash-0731", ENCODERS[encoder], vocab_size=600)
    Bytes(CHAT_TOKENS).save(folder)

    def load(*_):
        raise Stop

    monkeypatch.setattr(chat, "load", load)
    flags = argparse.Namespace(
        checkpoint=str(folder),
        thinking="thinking",
        effort=effort,
        release=None,
        system=None,
        seed=0,
        json=False,
        default_new_tokens=8,
        max_new_tokens=8,
        temperature=0.0,
        top_p=None,
        top_k=None,
        min_p=None,
        quant="none",
        kernels="",
        cache="dtype",
        cache_tokens=None,
        mesh=None,
        layout=None,
        dtype="float32",
        adapter=None,
    )
    with pytest.raises(Stop):
        chat.run(flags)
    first = capsys.readouterr().err.splitlines()[0]
    where = "encoding/encoding_dsv4.py"
    assert first == f"v4jax: chat of release {encoder} ({where}), thinking, effort {effort}"
    assert effort in EFFORTS[encoder]


def test_conversations_follow_the_checkpoint_that_a_run_begins_from(tmp_path, capsys):
    folder = checkpoint(tmp_path / "c", "flash-0731", ENCODERS["0731"])
    data = DataConfig(source=str(tmp_path), format="chat", column="messages", packing="best_fit")
    model = trunk_config("flash-0731")
    cfg = small_run(tmp_path, tmp_path / "run", model=model, data=data, init_from=str(folder))
    found = with_chat_release(cfg, tmp_path / "run")
    assert found.data.chat.release == "0731"
    assert "conversations in the format of release 0731 (encoding/" in capsys.readouterr().err
    chosen = dataclasses.replace(data, chat=ChatFormat(release="v4"))
    cfg = dataclasses.replace(cfg, data=chosen)
    assert with_chat_release(cfg, tmp_path / "run") == cfg
    checkpoint(tmp_path / "run", "flash", ENCODERS["v4"])  # a run that goes on asks its own files
    cfg = dataclasses.replace(cfg, data=data)
    assert with_chat_release(cfg, tmp_path / "run").data.chat.release == "v4"
    text = dataclasses.replace(cfg, data=DataConfig(source=str(tmp_path)))
    assert with_chat_release(text, tmp_path / "run") == text


def test_an_effort_that_the_release_lacks_is_refused(tmp_path):
    folder = checkpoint(tmp_path / "c", "flash", ENCODERS["v4"])
    format = ChatFormat(reasoning_effort="low")
    data = DataConfig(
        source=str(tmp_path), format="chat", column="messages", packing="best_fit", chat=format
    )
    for init_from in (str(folder), ""):
        model = trunk_config("flash")
        cfg = small_run(tmp_path, tmp_path / "run", model=model, data=data, init_from=init_from)
        with pytest.raises(ValueError, match="effort: got 'low'; allowed: None, high, max"):
            with_chat_release(cfg, tmp_path / "run")


def test_an_image_is_refused_where_the_tokenizer_knows_it():
    record = {"messages": [{"role": "user", "content": f"see {IMAGE}"}]}
    record["messages"].append({"role": "assistant", "content": "yes"})
    tokens, _ = conversation_tokens(record, "messages", ChatFormat(), Bytes(CHAT_TOKENS))
    assert len(tokens) > len(IMAGE)
    with pytest.raises(ValueError, match="v4jax takes text only"):
        conversation_tokens(record, "messages", ChatFormat(), Bytes((*CHAT_TOKENS, IMAGE)))
