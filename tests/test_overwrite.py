"""An export is written whole or not at all, and never over what is not an export."""

import pytest
from exports import CFG, GATE, PARAMS, assert_same
from trees import random_params, small_config

from v4jax.checkpoint import export, load_safetensors, save_safetensors
from v4jax.checkpoint.files import write_file


def listing(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_a_crash_leaves_nothing(tmp_path, monkeypatch):
    def crash(path, *rest):
        if "00002" in path.name:
            raise OSError("disk full")
        write_file(path, *rest)

    monkeypatch.setattr(export, "write_file", crash)
    with pytest.raises(OSError, match="disk full"):
        save_safetensors(CFG, PARAMS, tmp_path / "out", max_file_bytes=100_000)
    assert list(tmp_path.iterdir()) == []


def test_a_crash_leaves_the_earlier_export(tmp_path, monkeypatch):
    save_safetensors(CFG, PARAMS, tmp_path / "out")
    before = listing(tmp_path)
    monkeypatch.setattr(
        export, "write_json", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        save_safetensors(CFG, PARAMS, tmp_path / "out", dtype="float32", overwrite=True)
    assert listing(tmp_path) == before


def test_overwrite_replaces_an_export_wholly(tmp_path):
    save_safetensors(CFG, PARAMS, tmp_path / "out", max_file_bytes=150_000)
    save_safetensors(CFG, PARAMS, tmp_path / "out", dtype="float32", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_same(load_safetensors(tmp_path / "out")[1], PARAMS)


def test_overwrite_keeps_what_stands_beside_an_export(tmp_path):
    save_safetensors(CFG, PARAMS, tmp_path / "out", max_file_bytes=150_000)
    (tmp_path / "out" / "tokenizer.json").write_text("mine")
    save_safetensors(CFG, PARAMS, tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer.json")
    ]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "mine"


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_export_is_never_replaced(tmp_path, overwrite):
    target = tmp_path / "run"
    (target / "checkpoints").mkdir(parents=True)
    (target / "checkpoints" / "1").write_text("{}")
    (target / "config.json").write_text("{}")
    before = listing(tmp_path)
    with pytest.raises(
        ValueError,
        match="holds the directory checkpoints" if overwrite else "not empty; give a new",
    ):
        save_safetensors(CFG, PARAMS, target, overwrite=overwrite)
    with pytest.raises(ValueError, match="is a file; must be a directory"):
        save_safetensors(CFG, PARAMS, target / "config.json", overwrite=overwrite)
    assert listing(tmp_path) == before


def test_an_empty_directory_may_be_written_to(tmp_path):
    save_safetensors(CFG, PARAMS, tmp_path, overwrite=False)
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "5GB"])
def test_a_file_limit_is_a_positive_integer(tmp_path, limit):
    with pytest.raises(ValueError, match="max_file_bytes: got .*; must be a positive integer"):
        save_safetensors(CFG, PARAMS, tmp_path / "out", max_file_bytes=limit)


def test_parameters_of_another_model_are_not_written(tmp_path):
    other = small_config(q_lora_rank=21)
    with pytest.raises(
        ValueError, match=r"parameter layers_0_1/.*: got shape \[2, .*20\]; must be \[2, .*21\]"
    ):
        save_safetensors(other, PARAMS, tmp_path / "out")
    bad = random_params(CFG)
    bad["router"]["layers_2_2"]["block_0"]["ffn"]["tid2eid"][:] = 9
    with pytest.raises(ValueError, match=f"{GATE}: got expert id 9"):
        save_safetensors(CFG, bad, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
