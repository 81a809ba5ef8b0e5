"""Claims about which files of a source are read, what is said of others, and places in errors."""

import dataclasses
import gzip
import json
import os
import sys

import pytest

from v4jax.chat.tokens import CHAT_TOKENS, FIM_TOKENS
from v4jax.data.config import DataConfig, Source
from v4jax.data.documents import read_documents, split_documents
from v4jax.data.files import find_files, unread_files
from v4jax.data.listing import Listings
from v4jax.data.records import read_texts
from v4jax.data.store import open_store
from v4jax.data.summary import unread_lines, unused_lines
from v4jax.tokenizer import ByteTokenizer
from v4jax.train.data import held_out_sets, train_batches

CHAT = ByteTokenizer(CHAT_TOKENS + FIM_TOKENS)
SIZES = dict(seq_len=32, batch_size=2, vocab_size=CHAT.vocab_size)


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


def lines(*texts) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def names(source: Source) -> list[str]:
    return [name for name, _ in find_files(source).files]


def unread(source: Source) -> str:
    return unread_files(source, find_files(source))


def texts(source: Source) -> list[str]:
    return [text for _, text in read_texts(source)]


def source(path, form="jsonl", **more) -> Source:
    return Source(path=str(path), format=form, **more)


# ---- links ---------------------------------------------------------------------------------------


def test_links_to_folders_are_followed_and_each_real_folder_is_read_once(tmp_path):
    root, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    (root / "real").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    (root / "real" / "1.txt").write_text("one")
    (elsewhere / "deep" / "2.txt").write_text("two")
    (root / "linked").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere)
    (root / "a").symlink_to(root / "real")  # sorts before the folder it shows
    (root / "real" / "cycle").symlink_to(root)
    (elsewhere / "up").symlink_to(tmp_path)
    assert names(source(root, "text")) == ["again/deep/2.txt", "real/1.txt"]
    assert "again/up/ (a link to a folder around the source)" in unread(source(root, "text"))


def test_a_folder_is_read_under_the_name_that_glob_wants(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "1.txt").write_text("one")
    (tmp_path / "link").symlink_to("real")
    assert names(source(tmp_path, "text", glob="link/*.txt")) == ["link/1.txt"]
    assert (
        names(source(tmp_path, "text", glob="**/1.txt"))
        == names(source(tmp_path, "text", glob="*/*"))
        == ["real/1.txt"]
    )
    assert names(source(tmp_path, "text", glob="re[a-z]l/**")) == ["real/1.txt"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="nothing is closed to root")
def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(ValueError, match="closed cannot be listed: Permission denied"):
        find_files(source(tmp_path, "text"))


def test_each_real_file_is_read_once_under_the_name_that_tells_most(tmp_path):
    """The Hub's cache is like this: a snapshot's names are links to blobs."""
    for i in range(3):
        blob = tmp_path / "blobs" / f"{i}{i}"
        blob.parent.mkdir(exist_ok=True)
        blob.write_text(f"text {i}")
        for revision in ("r", "s"):
            link = tmp_path / "snapshots" / revision / f"{i}.txt"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    found = find_files(source(tmp_path, "text"))
    assert [name for name, _ in found.files] == [f"snapshots/r/{i}.txt" for i in range(3)]
    assert found.left_out[0] == ("blobs/00", "the same file as snapshots/r/0.txt")
    assert len(found.left_out) == 6
    assert names(source(tmp_path, "text", glob="blobs/*")) == [f"blobs/{i}{i}" for i in range(3)]


def test_a_link_to_a_file_beside_it_and_a_hard_link_are_read_once(tmp_path):
    (tmp_path / "z.jsonl").write_bytes(lines("a", "b"))
    (tmp_path / "a-link.jsonl").symlink_to("z.jsonl")
    (tmp_path / "y.jsonl").hardlink_to(tmp_path / "z.jsonl")
    (tmp_path / "same-content.jsonl").write_bytes(lines("a", "b"))
    assert names(source(tmp_path)) == ["same-content.jsonl", "y.jsonl"]
    assert "2 left out: a-link.jsonl (the same file as y.jsonl)" in unread(source(tmp_path))


# ---- what is left out ----------------------------------------------------------------------------


def test_what_is_left_out_is_named_and_counted(tmp_path):
    (tmp_path / "1.jsonl").write_bytes(lines("a", "b"))
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "no-suffix").write_text("x")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / "gone.jsonl").symlink_to("nothing")
    (tmp_path / "itself.jsonl").symlink_to("itself.jsonl")
    (tmp_path / "nothing.jsonl.gz").write_bytes(gzip.compress(b""))
    assert find_files(source(tmp_path)).left_out == [
        ("gone.jsonl", "a link to nothing"),
        ("itself.jsonl", "a link to nothing"),
        ("no-suffix", "no suffix"),
        ("notes.md", "suffix '.md'"),
        ("empty.jsonl", "empty"),
        ("nothing.jsonl.gz", "empty"),
        (".git/", "dot name"),
    ]
    assert unread(source(tmp_path)) == (
        "1 file(s) are read; 7 left out: gone.jsonl (a link to nothing), "
        "itself.jsonl (a link to nothing), no-suffix (no suffix) and 4 more"
    )
    assert unread(source(tmp_path, glob="1*")).endswith(
        "1 left out: .git/ (dot name); 6 excluded by glob='1*'"
    )


def test_each_source_has_a_line_of_its_own(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jsonl").write_bytes(lines("x", "y"))
        (tmp_path / name / "2.md").write_text("x")
    cfg = DataConfig(mixture=(source(tmp_path / "a"),), evaluate_on=(source(tmp_path / "b"),))
    said = unread_lines(cfg, Listings())
    assert [line.split(":")[0] for line in said] == [
        f"source {name} ({tmp_path / name})" for name in "ab"
    ]
    assert all("2.md (suffix '.md')" in line for line in said)
    (tmp_path / "a" / "2.md").unlink()
    assert len(unread_lines(cfg, Listings())) == 1


@pytest.mark.parametrize("cached", [False, True])
def test_records_without_text_are_counted_in_every_run(tmp_path, cached):
    """Also in a process that finds the tokens already made, in this process or in a cache."""
    (tmp_path / "x.jsonl").write_bytes(lines("a", "", "b", ""))
    one = source(tmp_path / "x.jsonl")
    cfg = DataConfig(mixture=(one,), cache=str(tmp_path / "cache") if cached else "")
    for _ in range(2):
        listings = Listings()
        assert len(open_store(cfg, one, CHAT, listings).ends) == 2
        assert unused_lines(cfg, CHAT, [32], None, listings) == [
            f"source x ({one.path}): 2 record(s) have an empty text"
        ]


def test_one_compressed_file_among_texts_is_said_to_move_all_into_memory(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    cfg = DataConfig(source=str(tmp_path))
    assert unread_lines(cfg, Listings()) == []
    (tmp_path / "3.txt.gz").write_bytes(gzip.compress(b"text 3"))
    assert unread_lines(cfg, Listings()) == [
        f"{cfg.sources[0].title}: 1 of 4 file(s) are compressed: the tokens of all are kept in "
        "memory (--data.cache keeps them on disk)"
    ]
    assert unread_lines(dataclasses.replace(cfg, cache=str(tmp_path / "c")), Listings()) == []


def test_json_is_read_if_it_is_json_lines_and_else_left_out_with_a_reason(tmp_path):
    (tmp_path / "1.jsonl").write_bytes(lines("a"))
    (tmp_path / "2.json").write_bytes(b"\n" + lines("b", "c"))
    (tmp_path / "array.json").write_text(json.dumps([{"text": "d"}]))
    (tmp_path / "info.json").write_text('{"rows": 3}\n')
    (tmp_path / "wide.json").write_text(json.dumps({"text": "e"}, indent=1))
    assert texts(source(tmp_path)) == ["a", "b", "c"]
    assert find_files(source(tmp_path)).left_out == [
        ("array.json", "a JSON array, not JSON lines: jq -c '.[]' array.json makes them"),
        ("info.json", "its first line has no 'text'"),
        ("wide.json", "not JSON lines"),
    ]


@pytest.mark.parametrize("value, query", [([{"text": "d"}], ".[]"), ({"text": "d"}, ".")])
def test_a_file_of_one_json_value_is_refused_with_a_way_out(tmp_path, value, query):
    (tmp_path / "x.json").write_text(json.dumps(value, indent=1))
    with pytest.raises(
        ValueError, match="x.json:1: not JSON: .*; one object a line is read, and jq -c"
    ) as caught:
        texts(source(tmp_path / "x.json"))
    assert f"jq -c '{query}' x.json" in str(caught.value)


def test_a_folder_without_a_file_to_read_says_what_is_there(tmp_path):
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(
        ValueError, match=r" holds no .jsonl, .ndjson or .json file \(.*x.csv \(suffix '.csv'\)"
    ):
        texts(source(tmp_path))


def test_numbered_parts_of_array_records_are_read(tmp_path):
    (tmp_path / "train.array_record-00000-of-00002").write_text("x")
    assert names(source(tmp_path, "arrayrecord")) == ["train.array_record-00000-of-00002"]


# ---- compressed files ----------------------------------------------------------------------------


def test_compressed_lines_are_read_beside_others(tmp_path):
    (tmp_path / "1.jsonl").write_bytes(lines("a"))
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(lines("b")) + gzip.compress(lines("c")))
    (tmp_path / "3.ndjson.zst").write_bytes(zstd(lines("d")) + zstd(lines("e")))
    (tmp_path / "4.JSON.GZ").write_bytes(gzip.compress(lines("f")))
    assert texts(source(tmp_path)) == list("abcdef")
    assert texts(source(tmp_path / "3.ndjson.zst")) == ["d", "e"]


def test_compressed_text_is_the_same_text_on_the_same_side(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "packed").mkdir()
    for i in range(20):
        text = f"text {i} é".encode()
        (tmp_path / "plain" / f"{i}.txt").write_bytes(text)
        data, suffix = (gzip.compress(text), ".gz") if i % 2 else (zstd(text), ".zst")
        (tmp_path / "packed" / f"{i}.txt{suffix}").write_bytes(data)
    sides = []
    for name in ("plain", "packed"):
        cfg = DataConfig(source=str(tmp_path / name), held_out=0.3)
        documents = read_documents(cfg.sources[0])
        assert all(document.size == len(document.text().encode()) for document in documents)
        sides.append(
            [{document.text() for document in side} for side in split_documents(cfg, documents)]
        )
        batches = held_out_sets(cfg, CHAT, **SIZES)["held_out"]
        assert sum(
            (batch["tokens"][batch["segment_ids"] > 0] == 1).sum() for batch in batches
        ) == len(sides[-1][1])
        assert next(train_batches(cfg, CHAT, **SIZES))
    assert sides[0] == sides[1]


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".zst", zstd)])
@pytest.mark.parametrize("form", ["jsonl", "text"])
def test_a_compressed_file_cut_short_or_damaged_is_named(tmp_path, suffix, pack, form):
    whole = pack(lines(*(str(i) * 50 for i in range(3000))))
    path = tmp_path / f"x.jsonl{suffix}"
    (tmp_path / "y.jsonl").write_bytes(lines("a"))
    for data in (
        whole[:-9],
        whole[: len(whole) // 2],
        whole + b"junk",
        whole[:9] + b"\xff" * 9 + whole[18:],
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"x\.jsonl{suffix}: cannot be read: "):
            open_store(DataConfig(source=str(tmp_path), format=form), source(tmp_path, form), CHAT)


def test_a_file_beside_its_compressed_copy_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(lines("a"))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines("a")))
    for form in ("jsonl", "text"):
        with pytest.raises(
            ValueError, match="holds both x.jsonl and x.jsonl.gz; remove one, or narrow glob"
        ):
            find_files(source(tmp_path, form))


def test_without_its_package_zst_is_one_line_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "1.jsonl").write_bytes(b"no JSON, but that is not what comes first")
    (tmp_path / "2.jsonl.zst").write_bytes(b"x" * 5000)
    monkeypatch.setitem(sys.modules, "compression", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for path, form in (
        (tmp_path, "jsonl"),
        (tmp_path, "text"),
        (tmp_path / "2.jsonl.zst", "jsonl"),
    ):
        with pytest.raises(
            ValueError,
            match=r"2.jsonl.zst: .* needs the package zstandard; pip install 'v4jax\[zstd\]'",
        ):
            find_files(source(path, form))
