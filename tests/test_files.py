"""Claims about which files of a source are read, what is said of the others, and that every error of a record has its place."""

import dataclasses
import gzip
import itertools
import json
import os
import sys

import pytest

from v4jax.chat.tokens import CHAT_TOKENS, FIM_TOKENS
from v4jax.data.compressed import open_data
from v4jax.data.config import DataConfig, Source
from v4jax.data.documents import read_documents, split_documents
from v4jax.data.files import find_files, left_out_line, tell_left_out
from v4jax.data.records import read_texts
from v4jax.data.store import open_store
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


def texts(source: Source) -> list[str]:
    return [text for _, text in read_texts(source)]


def source(path, form="jsonl", **more) -> Source:
    return Source(path=str(path), format=form, **more)


# ---- links -----------------------------------------------------------------------------------------------------------


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
    assert "again/up/ (a link to a folder around the source)" in left_out_line(source(root, "text"))


def test_a_folder_is_read_under_the_name_that_glob_wants(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "1.txt").write_text("one")
    (tmp_path / "link").symlink_to("real")
    assert names(source(tmp_path, "text", glob="link/*.txt")) == ["link/1.txt"]
    assert names(source(tmp_path, "text", glob="**/1.txt")) == names(source(tmp_path, "text", glob="*/*")) == ["real/1.txt"]
    assert names(source(tmp_path, "text", glob="re[a-z]l/**")) == ["real/1.txt"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="nothing is closed to root")
def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(ValueError, match="closed cannot be listed: Permission denied"):
        find_files(source(tmp_path, "text"))


# ---- what is left out ------------------------------------------------------------------------------------------------


def test_what_is_left_out_is_named_and_counted(tmp_path):
    (tmp_path / "1.jsonl").write_bytes(lines("a", "b"))
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "no-suffix").write_text("x")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / "gone.jsonl").symlink_to("nothing")
    (tmp_path / "nothing.jsonl.gz").write_bytes(gzip.compress(b""))
    assert find_files(source(tmp_path)).left_out == [
        ("gone.jsonl", "a link to nothing"), ("no-suffix", "no suffix"), ("notes.md", "suffix '.md'"),
        ("empty.jsonl", "empty"), ("nothing.jsonl.gz", "empty"), (".git/", "dot name"),
    ]  # fmt: skip
    assert left_out_line(source(tmp_path, name="s")) == (
        f"source s ({tmp_path}): 1 file(s) are read; 6 left out: gone.jsonl (a link to nothing), no-suffix (no suffix), "
        "notes.md (suffix '.md') and 3 more"
    )
    assert left_out_line(source(tmp_path, name="s", glob="1*")).endswith("1 left out: .git/ (dot name); 5 excluded by glob='1*'")


def test_it_is_said_once_a_source_on_stderr(tmp_path, capsys):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jsonl").write_bytes(lines("x", "y"))
        (tmp_path / name / "2.md").write_text("x")
    cfg = DataConfig(mixture=(source(tmp_path / "a"),), evaluate_on=(source(tmp_path / "b"),))
    tell_left_out(cfg)
    tell_left_out(cfg)
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in said] == ["v4jax: source a", "v4jax: source b"]
    assert all("2.md (suffix '.md')" in line for line in said)
    (tmp_path / "a" / "2.md").unlink()
    assert left_out_line(cfg.sources[0]) is None


def test_records_without_text_are_counted(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_bytes(lines("a", "", "b", ""))
    assert texts(source(tmp_path / "x.jsonl")) == ["a", "b"]
    assert "2 record(s) with an empty text are left out" in capsys.readouterr().err


def test_json_is_read_if_it_is_json_lines_and_else_left_out_with_a_reason(tmp_path):
    (tmp_path / "1.jsonl").write_bytes(lines("a"))
    (tmp_path / "2.json").write_bytes(b"\n" + lines("b", "c"))
    (tmp_path / "array.json").write_text(json.dumps([{"text": "d"}]))
    (tmp_path / "info.json").write_text('{"rows": 3}\n')
    (tmp_path / "wide.json").write_text(json.dumps({"text": "e"}, indent=1))
    assert texts(source(tmp_path)) == ["a", "b", "c"]
    assert find_files(source(tmp_path)).left_out == [
        ("array.json", "a JSON array, not JSON lines: jq -c '.[]' array.json makes them"),
        ("info.json", "its first line has no 'text'"), ("wide.json", "not JSON lines"),
    ]  # fmt: skip


@pytest.mark.parametrize("value, query", [([{"text": "d"}], ".[]"), ({"text": "d"}, ".")])
def test_a_file_of_one_json_value_is_refused_with_a_way_out(tmp_path, value, query):
    (tmp_path / "x.json").write_text(json.dumps(value, indent=1))
    with pytest.raises(ValueError, match="x.json:1: not JSON: .*; one object a line is read, and jq -c") as caught:
        texts(source(tmp_path / "x.json"))
    assert f"jq -c '{query}' x.json" in str(caught.value)


def test_a_folder_without_a_file_to_read_says_what_is_there(tmp_path):
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(ValueError, match=r"holds none matching '\*\*/\*' with suffix .jsonl or .ndjson or .json .*x.csv \(suffix '.csv'\)"):
        texts(source(tmp_path))


def test_numbered_parts_of_array_records_are_read(tmp_path):
    (tmp_path / "train.array_record-00000-of-00002").write_text("x")
    assert names(source(tmp_path, "arrayrecord")) == ["train.array_record-00000-of-00002"]


# ---- compressed files ------------------------------------------------------------------------------------------------


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
        sides.append([{document.text() for document in side} for side in split_documents(cfg, documents)])
        batches = held_out_sets(cfg, CHAT, **SIZES)["held_out"]
        assert sum((batch["tokens"][batch["segment_ids"] > 0] == 1).sum() for batch in batches) == len(sides[-1][1])
        assert next(train_batches(cfg, CHAT, **SIZES))
    assert sides[0] == sides[1]


@pytest.mark.parametrize("suffix, pack", [(".gz", gzip.compress), (".zst", zstd)])
@pytest.mark.parametrize("form", ["jsonl", "text"])
def test_a_compressed_file_cut_short_or_damaged_is_named(tmp_path, suffix, pack, form):
    whole = pack(lines(*(str(i) * 50 for i in range(3000))))
    path = tmp_path / f"x.jsonl{suffix}"
    (tmp_path / "y.jsonl").write_bytes(lines("a"))
    for data in (whole[:-9], whole[: len(whole) // 2], whole + b"junk", whole[:9] + b"\xff" * 9 + whole[18:]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"x\.jsonl{suffix}: cannot be read: "):
            open_store(DataConfig(source=str(tmp_path), format=form), source(tmp_path, form), CHAT)


def test_a_file_beside_its_compressed_copy_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(lines("a"))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines("a")))
    for form in ("jsonl", "text"):
        with pytest.raises(ValueError, match="holds both x.jsonl and x.jsonl.gz; remove one, or narrow glob"):
            find_files(source(tmp_path, form))


def test_without_its_package_zst_is_one_line_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "1.jsonl").write_bytes(b"no JSON, but that is not what comes first")
    (tmp_path / "2.jsonl.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "compression", None)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for path in (tmp_path, tmp_path / "2.jsonl.zst"):
        with pytest.raises(ValueError, match=r"2.jsonl.zst: reading .zst needs the package zstandard; pip install 'v4jax\[zstd\]'"):
            texts(source(path))


# ---- places ----------------------------------------------------------------------------------------------------------


def conversation(content):
    return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}]


def write(folder, form, records):
    """Two good records, then those given (bytes: as they are); the path, and the place of the third."""
    column = "messages" if form.startswith("chat") else "text"
    good = conversation("ok") if form.startswith("chat") else "ok"
    rows = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in ({column: good}, {column: good}, *records)]
    if form == "arrayrecord":
        path = folder / "x.array_record"
        writer = pytest.importorskip("array_record.python.array_record_module").ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            writer.write(row)
        writer.close()
        return path, 2
    packed = {"": bytes, "gz": gzip.compress, "zst": zstd}[form.partition(".")[2]]
    path = folder / f"x.jsonl{form.removeprefix('chat').removeprefix('jsonl')}"
    path.write_bytes(packed(b"\n".join(rows) + b"\n"))
    return path, 3


FAULTS = {
    "not JSON": (b'{"text": ', "not JSON"),
    "not UTF-8": (b'{"text": "\xff"}', "not UTF-8 text: byte 10 of it"),
    "byte order mark": (b'\xef\xbb\xbf{"text": "x"}', "not JSON: Unexpected UTF-8 BOM"),
    "a list": ([], "got list; must be a JSON object"),
    "no column": ({"txt": "x"}, "has no column '(text|messages)'; there are: txt"),
    "nested too deep": (b"[" * 100_000, "RecursionError"),
    "a number": ({"text": 5, "messages": 5}, "column 'text' is int; must be text|messages: got int"),
    "null": ({"text": None, "messages": None}, "column 'text' is null; must be text|messages: got NoneType"),
    "a lone surrogate": ({"text": "bad \ud83d here", "messages": conversation("bad \ud83d here")}, "half of a surrogate pair"),
    "content that is a number": ({"text": ["x"], "messages": conversation(5)}, "."),
}


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.zst", "chat", "chat.gz", "arrayrecord"])
def test_every_fault_of_a_record_has_its_file_and_place(tmp_path, form):
    column = "messages" if form.startswith("chat") else "text"
    for fault, (record, words) in FAULTS.items():
        path, place = write(tmp_path, form, [record])
        cfg = DataConfig(
            source=str(path), format=form.partition(".")[0], column=column, packing="best_fit" if column == "messages" else "split"
        )
        with pytest.raises(ValueError, match=rf"^{path}:{place}: .*({words})") as caught:
            train_batches(cfg, CHAT, **SIZES)
        assert str(caught.value).count(str(path)) == 1 and "\n" not in str(caught.value), fault


def test_faults_of_parquet_rows_have_their_place(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    raw = pyarrow.array([b"ok", b"ok", b"\xff"], pyarrow.binary())
    columns = {
        "column 'text' is null": pyarrow.array(["a", "b", None]),
        "can't decode byte 0xff": pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers()),
    }
    for words, column in columns.items():
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
        with pytest.raises(ValueError, match=rf"^{tmp_path}/x.parquet:3: .*{words}"):
            texts(source(tmp_path / "x.parquet", "parquet"))


class Fails(ByteTokenizer):
    """Breaks, as no tokenizer should, at one text."""

    def encode(self, text):
        if "bad" in text:
            raise TypeError("boom")
        return super().encode(text)


def test_whatever_a_tokenizer_raises_has_its_place(tmp_path):
    path, place = write(tmp_path, "jsonl", [{"text": "bad"}])
    with pytest.raises(ValueError, match=rf"^{path}:{place}: TypeError: boom"):
        train_batches(DataConfig(source=str(path), format="jsonl"), Fails(), **SIZES)
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("bad")
    for cfg in (DataConfig(source=str(tmp_path), glob="*.txt"), DataConfig(source=str(tmp_path), glob="*.txt", packing="best_fit")):
        with pytest.raises(ValueError, match=rf"{tmp_path}/\d.txt: TypeError: boom"):
            list(itertools.islice(train_batches(cfg, Fails(), **SIZES), 3))


def test_records_that_are_evaluated_on_have_their_place_too(tmp_path):
    (tmp_path / "good.jsonl").write_bytes(lines("a", "b"))
    path, place = write(tmp_path, "jsonl", [{"text": "bad \ud83d"}])
    cfg = DataConfig(source=str(tmp_path / "good.jsonl"), format="jsonl", evaluate_on=(source(path, name="more"),))
    with pytest.raises(ValueError, match=rf"^{path}:{place}: "):
        held_out_sets(cfg, CHAT, **SIZES)


def test_bytes_that_are_no_text_have_their_position(tmp_path):
    (tmp_path / "x.txt").write_bytes("é".encode() * 2**20 + b"\xff")
    (tmp_path / "y.txt.gz").write_bytes(gzip.compress(b"x" * (2**20 - 1) + b"\xc3\x28"))
    (tmp_path / "z.txt").write_bytes(b"abc\xc3")
    for name, byte in (("x.txt", 2**21), ("y.txt.gz", 2**20 - 1), ("z.txt", 3)):
        with pytest.raises(ValueError, match=rf"{name} is not UTF-8 text \(byte {byte}: "):
            read_documents(source(tmp_path, "text", glob=name))


def test_a_conversation_that_is_too_long_has_its_place(tmp_path, capsys):
    path, place = write(tmp_path, "chat", [{"messages": conversation("x" * 99)}])
    cfg = DataConfig(source=str(path), format="chat", column="messages", packing="best_fit")
    with pytest.raises(ValueError, match=rf"^{path}:{place}: conversation 2 of .* has \d+ tokens, a row 32"):
        train_batches(cfg, CHAT, **SIZES)
    train_batches(dataclasses.replace(cfg, chat=dataclasses.replace(cfg.chat, too_long="drop")), CHAT, **SIZES)
    assert "1 of 3 conversations are longer than a row of 32 tokens and left out" in capsys.readouterr().err


def test_a_document_that_changes_size_while_it_is_read_is_named(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("some text")
    batches = train_batches(DataConfig(source=str(tmp_path)), CHAT, **SIZES)
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("less")
    with pytest.raises(ValueError, match=r"\d.txt: changed while it was read: had 9 bytes, has 4"):
        next(batches)


def test_an_archive_is_no_text(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(b"name\0\0text"))
    (tmp_path / "1.txt").write_text("x")
    assert find_files(source(tmp_path, "text")).left_out == [("x.tar.gz", "an archive: unpack it")]
    with open_data(tmp_path / "x.tar.gz") as file:
        assert file.read(4) == b"name"
