"""Claims about v4jax/tokenizer/."""

import builtins
import json

import numpy as np
import pytest

from v4jax.tokenizer import (
    BOS_TOKEN,
    EOS_TOKEN,
    ByteTokenizer,
    HuggingFaceTokenizer,
    check_tokens,
    document_ids,
    load_tokenizer,
    prompt_ids,
)
from v4jax.tokenizer.checks import require_tokens

TEXTS = [
    "",
    " ",
    "  two  spaces, tab\t, newline\r\n\n",
    "é!",
    "深度求索 🐋👩‍👩‍👧 ﷽ \u0000\u007f\u0080\u00a0\u00ad\u2028\ufeff\ufffd",
    "def f(x):\n    return x ** 2  # ½\n",
    "don't 123,456 I'LL",
    "".join(map(chr, range(0x300))),
]


def random_text(rng: np.random.Generator, length: int) -> str:
    points = rng.integers(0, 0x110000, length)
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


@pytest.fixture
def saved(tmp_path):
    ByteTokenizer().save(tmp_path / "tok")
    return tmp_path / "tok"


def small_bpe(directory, *, specials=(BOS_TOKEN, EOS_TOKEN), config=None, truncation=None):
    """Writes a tokenizer with merges (so that it is not ours) to directory."""
    vocab = {"a": 0, "b": 1, "ab": 2} | {name: 3 + i for i, name in enumerate(specials)}
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    raw = {
        "version": "1.0",
        "truncation": truncation,
        "padding": None,
        "added_tokens": [{"id": 3 + i, "content": name} | flags for i, name in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]},
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


# ---- bytes ---------------------------------------------------------------------------------------


def test_ids_are_bytes_moved_up_by_two():
    assert ByteTokenizer().encode("é!") == [0xC3 + 2, 0xA9 + 2, 0x21 + 2]
    assert (
        ByteTokenizer().vocab_size,
        ByteTokenizer().bos_token_id,
        ByteTokenizer().eos_token_id,
    ) == (258, 0, 1)


@pytest.mark.parametrize("text", TEXTS)
def test_decode_gives_back_what_was_encoded(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert all(type(token) is int and 2 <= token < 258 for token in ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(np.array([0, *ids, 1], np.int32)) == text


def test_decode_replaces_broken_bytes_and_ids_of_no_byte():
    decode = ByteTokenizer().decode
    assert decode([0xC3 + 2, 2 + ord("x")]) == "\ufffdx"
    assert decode([2 + ord("x"), 300, 2 + ord("y")]) == "x\ufffdy"
    with pytest.raises(ValueError, match="ids: got -1"):
        decode([5, -1])


def test_half_a_surrogate_pair_is_refused_by_its_place():
    with pytest.raises(ValueError, match=r"surrogate pair .* at character 2"):
        ByteTokenizer().encode("ab\ud800")


SPECIALS = ("<think>", "</think>", "<｜User｜>")


def test_special_tokens_follow_the_bytes():
    tokenizer = ByteTokenizer(SPECIALS)
    assert tokenizer.vocab_size == 261 and tokenizer.encode(f"a</think>b<think{BOS_TOKEN}") == [
        99,
        259,
        100,
        *ByteTokenizer().encode("<think"),
        0,
    ]
    assert tokenizer.decode([99, 259, 100, 261, 0]) == "ab\ufffd"
    require_tokens(tokenizer, SPECIALS, "a test")
    with pytest.raises(ValueError, match="tokenizer: has no token <think>, which a test needs"):
        require_tokens(ByteTokenizer(), SPECIALS, "a test")


def test_special_tokens_are_saved_and_read_by_both(tmp_path):
    ours = ByteTokenizer(SPECIALS)
    ours.save(tmp_path)
    again, theirs = load_tokenizer(tmp_path), HuggingFaceTokenizer(tmp_path / "tokenizer.json")
    assert (
        isinstance(again, ByteTokenizer)
        and again.fingerprint == ours.fingerprint == theirs.fingerprint
    )
    assert again.fingerprint != ByteTokenizer().fingerprint
    for text in (*TEXTS, f"<think>é</think>{EOS_TOKEN}<｜User｜><｜User"):
        assert again.encode(text) == theirs.encode(text) == ours.encode(text)
        assert theirs.decode(theirs.encode(text)) == ours.decode(ours.encode(text))


# ---- the same as a Hugging Face file -------------------------------------------------------------


def test_saved_byte_tokenizer_is_read_back_without_further_packages(saved, monkeypatch):
    forbid_tokenizers(monkeypatch)
    assert isinstance(load_tokenizer(saved), ByteTokenizer)
    assert isinstance(load_tokenizer(str(saved / "tokenizer.json")), ByteTokenizer)


def test_tokenizers_reads_the_saved_file_with_the_same_ids(saved):
    theirs, ours = HuggingFaceTokenizer(saved / "tokenizer.json"), ByteTokenizer()
    assert (theirs.vocab_size, theirs.bos_token_id, theirs.eos_token_id) == (258, 0, 1)
    rng = np.random.default_rng(0)
    for text in TEXTS + [random_text(rng, 300) for _ in range(20)]:
        assert theirs.encode(text) == ours.encode(text), repr(text)
        assert theirs.decode(theirs.encode(text)) == text


def test_tokenizers_decodes_broken_utf8_as_we_do(saved):
    theirs, ours = HuggingFaceTokenizer(saved / "tokenizer.json"), ByteTokenizer()
    rng = np.random.default_rng(1)
    for _ in range(200):
        ids = rng.integers(0, 300, 40)
        assert theirs.decode(ids) == ours.decode(ids)


@pytest.mark.parity
def test_transformers_opens_the_saved_directory_with_the_same_ids(saved, tmp_path):
    transformers = pytest.importorskip("transformers")
    (saved / "config.json").write_text(json.dumps({"model_type": "deepseek_v4"}))
    for tokenizer in (
        transformers.AutoTokenizer.from_pretrained(saved),
        transformers.PreTrainedTokenizerFast.from_pretrained(saved),
    ):
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert ids == ByteTokenizer().encode(text)
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, 258)
        tokenizer.save_pretrained(tmp_path / "again")
        assert isinstance(load_tokenizer(tmp_path / "again"), ByteTokenizer)


# ---- other Hugging Face files --------------------------------------------------------------------


def forbid_tokenizers(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "tokenizers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)


def test_a_merging_tokenizer_is_wrapped(tmp_path):
    tokenizer = load_tokenizer(small_bpe(tmp_path))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert tokenizer.encode("abba") == [2, 1, 0]
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id) == (5, 3, 4)
    assert tokenizer.decode([3, 2, 1, 99, 0, 4]) == "abb\ufffda"


def test_special_tokens_come_from_tokenizer_config(tmp_path):
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    tokenizer = load_tokenizer(small_bpe(tmp_path, specials=("</s>", "<s>"), config=config))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (4, 3)


def test_a_tokenizer_without_bos_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"bos_token None is not in its vocabulary; tokenizer_config.json"
    ):
        load_tokenizer(small_bpe(tmp_path, config={"bos_token": None, "eos_token": EOS_TOKEN}))


def test_truncation_left_in_the_file_cuts_nothing(tmp_path):
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    assert len(load_tokenizer(small_bpe(tmp_path, truncation=truncation)).encode("ba" * 50)) == 51


def test_a_wrapped_tokenizer_is_saved_as_it_was_read(tmp_path):
    source = small_bpe(
        tmp_path / "a", specials=("<s>", "</s>"), config={"bos_token": "<s>", "eos_token": "</s>"}
    )
    load_tokenizer(source).save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (source / name).read_bytes()
    assert load_tokenizer(tmp_path / "b").bos_token_id == 3


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    small_bpe(tmp_path)
    forbid_tokenizers(monkeypatch)
    with pytest.raises(ValueError, match=r"v4jax\[tokenizers\]"):
        load_tokenizer(tmp_path)


def test_bad_files_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer.json: no such file"):
        load_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    faults = {
        b"{": "not JSON",
        b"[]": "JSON object",
        b"\xff": "cannot be read",
        b"{}": "not a Hugging Face",
    }
    for content, text in faults.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=text) as caught:
            load_tokenizer(tmp_path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# ---- check_tokens --------------------------------------------------------------------------------


def test_check_tokens_names_the_first_bad_id_and_its_place():
    tokens = np.zeros((3, 5), np.int64)
    check_tokens(tokens, 258, "tokens")
    tokens[1, 4], tokens[2, 0] = 258, -7
    with pytest.raises(
        ValueError, match=r"^prompt: got id 258 at \[1, 4\]; allowed: \[0, vocab_size=258\)$"
    ):
        check_tokens(tokens, 258, "prompt")
    tokens[1, 4] = 257
    with pytest.raises(ValueError, match=r"got id -7 at \[2, 0\]"):
        check_tokens(tokens, 258)


def test_check_tokens_takes_any_shape_and_only_integers():
    check_tokens(np.zeros((0, 4), np.uint16), 10)
    check_tokens([1, 2, 3], 4)
    with pytest.raises(ValueError, match=r"got id 11 at \[\]"):
        check_tokens(np.int32(11), 10)
    with pytest.raises(ValueError, match="dtype float64"):
        check_tokens(np.array([1.0]), 10)


# ---- bos and eos ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["ab", f"{BOS_TOKEN}ab", f"{BOS_TOKEN * 2}ab{EOS_TOKEN}", f"ab{EOS_TOKEN * 2}"]
)
def test_a_document_has_one_bos_and_one_eos_whatever_its_text_spells_out(tmp_path, text):
    ours, merging = ByteTokenizer(["<a>"]), load_tokenizer(small_bpe(tmp_path))
    for tokenizer, inner in ((ours, [99, 100]), (merging, [2])):
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        assert document_ids(tokenizer, text) == [bos, *inner, eos]
        assert document_ids(tokenizer, text, begins=False)[-1] == eos
        if not text.endswith(EOS_TOKEN):
            assert prompt_ids(tokenizer, text) == [bos, *inner]


def test_names_of_special_tokens_inside_a_text_and_at_a_cut_stay():
    tokenizer = ByteTokenizer(["<a>"])
    assert document_ids(tokenizer, f"a{EOS_TOKEN}{BOS_TOKEN}b") == [0, 99, 1, 0, 100, 1]
    assert document_ids(tokenizer, f"{BOS_TOKEN}a{EOS_TOKEN}", begins=False, ends=False) == [
        0,
        99,
        1,
    ]
    assert prompt_ids(tokenizer, f"a{EOS_TOKEN}") == [0, 99, 1]


def test_a_tokenizer_without_special_tokens_reads_their_names_as_text():
    tokenizer = ByteTokenizer()
    for text in (BOS_TOKEN, EOS_TOKEN, f"{BOS_TOKEN}a{EOS_TOKEN}"):
        assert tokenizer.decode(document_ids(tokenizer, text)) == text


def test_names_of_another_tokenizer_are_its_own(tmp_path):
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = load_tokenizer(small_bpe(tmp_path, specials=("<s>", "</s>"), config=names))
    assert document_ids(tokenizer, "<s>ab</s>") == [3, 2, 4] == document_ids(tokenizer, "ab")
