"""Claims about errors of records: each has its file and place, in every format."""

import errno
import gzip
import itertools
import json
import os
import re

import pytest

from v4jax.chat.tokens import CHAT_TOKENS, FIM_TOKENS
from v4jax.data.compressed import open_data
from v4jax.data.config import DataConfig, Source
from v4jax.data.documents import Document, read_documents
from v4jax.data.files import find_files
from v4jax.data.records import read_texts
from v4jax.tokenizer import ByteTokenizer
from v4jax.train.data import held_out_sets, train_batches

CHAT = ByteTokenizer(CHAT_TOKENS + FIM_TOKENS)
SIZES = dict(seq_len=32, batch_size=2, vocab_size=CHAT.vocab_size)


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


def lines(*texts) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def texts(source: Source) -> list[str]:
    return [text for _, text in read_texts(source)]


def source(path, form="jsonl", **more) -> Source:
    return Source(path=str(path), format=form, **more)


def conversation(content):
    return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}]


def write(folder, form, records):
    """Writes two good records, then those given (bytes as they are); path and the third's place."""
    column = "messages" if form.startswith("chat") else "text"
    good = conversation("ok") if form.startswith("chat") else "ok"
    rows = [
        record if isinstance(record, bytes) else json.dumps(record).encode()
        for record in ({column: good}, {column: good}, *records)
    ]
    if form == "arrayrecord":
        path = folder / "x.array_record"
        writer = pytest.importorskip("array_record.python.array_record_module").ArrayRecordWriter(
            str(path), "group_size:1"
        )
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
    "byte order mark": (b'\xef\xbb\xbf{"text": "x"}', "not JSON: unexpected UTF-8 BOM"),
    "a key twice": (b'{"text": "x", "text": "y"}', "got key 'text' twice in one object"),
    "a control character": (
        b'{"text": "a\x01"}',
        "not JSON: invalid control character at column 12$",
    ),
    "a list": ([], "got list; must be a JSON object"),
    "no column": ({"txt": "x"}, "has no column '(text|messages)'; there are: txt"),
    "nested too deep": (b"[" * 100_000, "RecursionError"),
    "a number": (
        {"text": 5, "messages": 5},
        "column 'text' is int; must be text|messages: got int",
    ),
    "null": (
        {"text": None, "messages": None},
        "column 'text' is null; must be text|messages: got NoneType",
    ),
    "a lone surrogate": (
        {"text": "bad \ud83d here", "messages": conversation("bad \ud83d here")},
        "half of a surrogate pair",
    ),
    "content that is a number": ({"text": ["x"], "messages": conversation(5)}, "."),
}


@pytest.mark.parametrize(
    "form", ["jsonl", "jsonl.gz", "jsonl.zst", "chat", "chat.gz", "arrayrecord"]
)
def test_every_fault_of_a_record_has_its_file_and_place(tmp_path, form):
    column = "messages" if form.startswith("chat") else "text"
    for fault, (record, words) in FAULTS.items():
        path, place = write(tmp_path, form, [record])
        cfg = DataConfig(
            source=str(path),
            format=form.partition(".")[0],
            column=column,
            packing="best_fit" if column == "messages" else "split",
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
    """A tokenizer that breaks at one text."""

    def encode(self, text):
        if "bad" in text:
            raise TypeError("boom")
        return super().encode(text)


def test_a_fault_of_the_program_stays_what_it_is_and_its_traceback_has_the_place(tmp_path):
    path, place = write(tmp_path, "jsonl", [{"text": "bad"}])
    with pytest.raises(TypeError, match="^boom") as caught:
        train_batches(DataConfig(source=str(path), format="jsonl"), Fails(), **SIZES)
    assert caught.value.__notes__ == [f"v4jax: the data at {path}:{place} led to this"]
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("bad")
    for cfg in (
        DataConfig(source=str(tmp_path), glob="*.txt"),
        DataConfig(source=str(tmp_path), glob="*.txt", packing="best_fit"),
    ):
        with pytest.raises(TypeError, match="^boom") as caught:
            list(itertools.islice(train_batches(cfg, Fails(), **SIZES), 3))
        assert re.search(rf"{tmp_path}/\d.txt led to this", caught.value.__notes__[0])


def test_records_that_are_evaluated_on_have_their_place_too(tmp_path):
    (tmp_path / "good.jsonl").write_bytes(lines("a", "b"))
    path, place = write(tmp_path, "jsonl", [{"text": "bad \ud83d"}])
    cfg = DataConfig(
        source=str(tmp_path / "good.jsonl"),
        format="jsonl",
        evaluate_on=(source(path, name="more"),),
    )
    with pytest.raises(ValueError, match=rf"^{path}:{place}: "):
        held_out_sets(cfg, CHAT, **SIZES)


def test_bytes_that_are_no_text_have_their_position(tmp_path):
    (tmp_path / "x.txt").write_bytes("é".encode() * 2**20 + b"\xff")
    (tmp_path / "y.txt.gz").write_bytes(gzip.compress(b"x" * (2**20 - 1) + b"\xc3\x28"))
    (tmp_path / "z.txt").write_bytes(b"abc\xc3")
    for name, byte in (("x.txt", 2**21), ("y.txt.gz", 2**20 - 1), ("z.txt", 3)):
        with pytest.raises(ValueError, match=rf"{name} is not UTF-8 text \(byte {byte}: "):
            read_documents(source(tmp_path, "text", glob=name))


def test_a_conversation_that_is_too_long_has_its_place(tmp_path):
    path, place = write(tmp_path, "chat", [{"messages": conversation("x" * 99)}])
    cfg = DataConfig(source=str(path), format="chat", column="messages", packing="best_fit")
    words = rf"^{path}:{place}: this conversation has \d+ tokens, and a row holds 32; raise seq_len"
    with pytest.raises(ValueError, match=words):
        train_batches(cfg, CHAT, **SIZES)


def test_a_document_that_is_lost_or_changed_while_a_run_reads_it_is_a_failure_of_the_run(tmp_path):
    """The exit code is 1, not 2: the source was good when the run began."""
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("some text")
    batches = train_batches(DataConfig(source=str(tmp_path)), CHAT, **SIZES)
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("less")
    with pytest.raises(OSError, match=r"\d.txt: changed while it was read: had 9 bytes, has 4"):
        next(batches)
    for i in range(3):
        (tmp_path / f"{i}.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: .*\d.txt"):
        next(batches)


def test_a_disk_that_fails_is_no_bad_input_and_the_file_is_named(tmp_path):
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(OSError, match="x.txt") as caught, open_data(tmp_path / "x.txt"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert caught.value.errno == errno.EIO
    with pytest.raises(ValueError, match="y.txt: cannot be read: No such file"):
        open_data(tmp_path / "y.txt").__enter__()


def test_a_file_that_cannot_be_opened_is_named_once(tmp_path):
    for name in ("gone.txt", "gone.txt.gz"):
        with pytest.raises(ValueError, match="cannot be read: No such file") as caught:
            Document(name, tmp_path / name, 9).text()
        assert str(caught.value).count(str(tmp_path)) == 1


def test_an_archive_is_no_text(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(b"name\0\0text"))
    (tmp_path / "1.txt").write_text("x")
    assert find_files(source(tmp_path, "text")).left_out == [("x.tar.gz", "an archive: unpack it")]
    with open_data(tmp_path / "x.tar.gz") as file:
        assert file.read(4) == b"name"
