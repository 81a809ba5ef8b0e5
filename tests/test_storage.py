"""Paths: what is no path on this machine is refused by name in one line; ~ is a home directory."""

import argparse
import json
import os
import pathlib

import numpy as np
import pytest
from exports import CFG, PARAMS, write
from trees import small_config

import v4jax
from v4jax.api import load_onto
from v4jax.checkpoint.export import carried_files
from v4jax.checkpoint.load import load_safetensors, open_safetensors, read_config
from v4jax.checkpoint.run_config import check_config, write_config
from v4jax.checkpoint.store import Store, is_run
from v4jax.cli import main as cli
from v4jax.cli.arguments import ADAPTER, CHECKPOINT, NEW_FILE, PATH, PLACE
from v4jax.cli.commands import parser
from v4jax.convert.compare import compare
from v4jax.convert.conversion import convert
from v4jax.convert.sources import open_checkpoint
from v4jax.data.config import DataConfig, Source, tokenizer_of
from v4jax.generate.prefix import check_store
from v4jax.generate.rollout import Plan, rollout
from v4jax.generate.steps import DecodeConfig
from v4jax.planner.hardware import hardware_of, target_of
from v4jax.score import read_tokens, score
from v4jax.storage import file_to_write, folder_to_fill, local_path, path_of_checkpoints, places
from v4jax.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer
from v4jax.train.config import TrainConfig
from v4jax.train.loop import train
from v4jax.train.metrics_file import read_metrics
from v4jax.train.picture import write_summary

BUCKET = "gs://bucket/x"
WORDS = "must be a path on this machine; buckets (gs://, s3://, ...) are not supported here"
NEEDS = "needs the package v4jax_missing; pip install"
ROOT = pathlib.Path(__file__).parent.parent
MODEL = small_config()


def run_of(**changes):
    fields = dict(
        model=MODEL,
        run_dir="r",
        steps=1,
        batch_size=1,
        seq_len=8,
        learning_rate=1e-3,
        warmup_steps=0,
    )
    return TrainConfig(**fields | changes)


@pytest.fixture(autouse=True)
def no_packages(monkeypatch):
    """The packages that read buckets are missing, so what takes a bucket refuses it here."""
    missing = {scheme: ("v4jax_missing", extra) for scheme, (_, extra) in places.PACKAGES.items()}
    monkeypatch.setattr(places, "PACKAGES", missing)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Each test runs in its own folder, where a misread path would show."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# ---- one path ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        "gs://b/run",
        "s3://b/run",
        "hf://a/b",
        "file:///tmp/x",
        "https://h/x",
        "GS://b",
        "gs:/b/run",
        pathlib.Path("gs://b/run"),
        pathlib.PurePosixPath("s3://b"),
    ],
)
def test_an_address_is_refused_as_text_and_as_pathlib_folds_it(given):
    with pytest.raises(ValueError) as error:
        local_path(given, "--run-dir")
    assert str(error.value) == f"--run-dir: got {str(given)!r}; {WORDS}"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "must not be empty"),
        ("a\0b", "must not hold a NUL character"),
        ("a/" + "x" * 300 + "/b", "has a name of 300 bytes; a file system takes at most 255"),
        ("\ud800", "must be text that a file name can hold"),
        ("~nobody-of-that-name/x", "there is no user 'nobody-of-that-name' with a home directory"),
        (None, "got None; must be a path"),
        (3, "got 3; must be a path"),
        (b"x", "got b'x'; must be a path"),
    ],
)
def test_what_no_file_can_be_called_is_refused(given, words):
    with pytest.raises(ValueError, match="^out: got ") as error:
        local_path(given, "out")
    assert (
        words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400
    )


def test_homes_are_expanded_and_nothing_else_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/a", "x") == local_path(pathlib.Path("~/a"), "x") == tmp_path / "a"
    assert local_path("~", "x") == tmp_path
    assert local_path("~root/a", "x") == pathlib.Path(os.path.expanduser("~root")) / "a"
    for text in ("a/b", "/a/b", "../a", "a~b", "a:b", "v5p:4x4x8", "org/name"):
        assert str(local_path(text, "x")) == text


@pytest.mark.parametrize("text", ["./gs:/x", "./~x", "~/a", "a"])
def test_what_was_read_once_stays_as_it_is(text, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    once = local_path(text, "x")
    assert local_path(once, "x") == local_path(str(once), "x") == once
    assert (
        once.absolute() == pathlib.Path(os.path.expanduser(text)).absolute()
        if text[0] != "."
        else once.is_absolute()
    )


def test_a_place_for_a_folder_or_a_file_is_checked_and_not_made(tmp_path):
    (tmp_path / "file").write_text("")
    assert folder_to_fill(tmp_path / "a/b/c", "run_dir") == tmp_path / "a/b/c"
    assert file_to_write(tmp_path / "new", "out") == tmp_path / "new" and file_to_write(
        tmp_path / "file", "out"
    )
    for bad, why in (("file", ", which"), ("file/run", f"; {tmp_path}/file")):
        words = f"^run_dir: got {tmp_path}/{bad}{why} is not a folder$"
        with pytest.raises(ValueError, match=words):
            folder_to_fill(tmp_path / bad, "run_dir")
    with pytest.raises(
        ValueError, match=f"^out: got {tmp_path}/a/new; its folder {tmp_path}/a does not exist$"
    ):
        file_to_write(tmp_path / "a/new", "out")
    with pytest.raises(ValueError, match=f"^out: got {tmp_path}; must be a file, and is a folder$"):
        file_to_write(tmp_path, "out")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="gone, which is not a folder"):
        folder_to_fill(tmp_path / "gone", "run_dir")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "gone", "here"]


def test_a_place_that_may_not_be_written_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(
        ValueError, match=f"^run_dir: got {tmp_path}/a/b; {tmp_path} may not be written to$"
    ):
        folder_to_fill(tmp_path / "a/b", "run_dir")
    with pytest.raises(
        ValueError, match=f"^out: got {tmp_path}/a; its folder {tmp_path} may not be written to$"
    ):
        file_to_write(tmp_path / "a", "out")


@pytest.mark.parametrize("given", ["gs:", "a/  gs:", "my-gs:/run", "s3:/run"])
def test_a_run_directory_that_orbax_takes_for_a_bucket_is_refused_before_any_work(
    given, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    name = next(part for part in pathlib.PurePath(given).parts if part.endswith(":"))
    words = f"{tmp_path}/.*; Orbax, which writes checkpoints, takes '{name}' in it for the address"
    with pytest.raises(ValueError, match=f"^run_dir: got {words}"):
        train(run_of(run_dir=f"./{given}/b"))
    with pytest.raises(ValueError, match=f"^directory: got {words}"):
        Store(f"./{given}/b")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("given", ["gs:", "gs:/store"])
def test_a_store_is_not_converted_to_where_orbax_cannot_read_it(given, tmp_path, checkpoint):
    with pytest.raises(ValueError, match="^target: got .*; Orbax, .* takes 'gs:' in it"):
        convert(checkpoint, tmp_path / given, "orbax")
    assert list(tmp_path.rglob("gs:*")) == []


def test_orbax_keeps_other_colons_and_names_of_buckets_below_the_root(tmp_path):
    for name in ("gs", "gs:b", "a:", "hf:"):
        assert path_of_checkpoints(tmp_path / name / "run") == tmp_path / name / "run"
    with pytest.raises(ValueError, match="^run_dir: got /s3/run; Orbax, .* takes '/s3' in it"):
        path_of_checkpoints("/s3/run", "run_dir")


# ---- the command line ----------------------------------------------------------------------------

COMMAND_LINES = {
    ("train", "config"): "train {path}",
    ("plot", "RUN"): "plot {path}",
    ("generate", "checkpoint"): "generate {path} --tokens 1",
    ("generate", "--prefix-cache"): "generate {ckpt} --tokens 1 --prefix-cache {path}",
    ("chat", "checkpoint"): "chat {path}",
    ("score", "checkpoint"): "score {path} --tokens t.npy --out o.npz",
    ("score", "--tokens"): "score {ckpt} --tokens {path} --out o.npz",
    ("score", "--out"): "score {ckpt} --tokens t.npy --out {path}",
    ("convert", "source"): "convert {path} out",
    ("convert", "target"): "convert {ckpt} {path}",
    ("generate", "--adapter"): "generate {ckpt} --tokens 1 --adapter {path}",
    ("chat", "--adapter"): "chat {ckpt} --adapter {path}",
    ("score", "--adapter"): "score {ckpt} --tokens t.npy --out o.npz --adapter {path}",
    ("convert", "--adapter"): "convert {ckpt} out --adapter {path}",
    ("info", "checkpoint"): "info {path}",
    ("cost", "config"): "cost {path}",
    ("layout", "config"): "layout {path}",
    ("layout", "--report"): "layout {cfg} --report {path}",
    ("layout", "--stablehlo"): "layout {cfg} --stablehlo {path}",
    ("layout", "--measure"): "layout --measure {path}",
}
"""Every argument that the parser takes for a path."""
OVERRIDES = (
    "run-dir",
    "init-from",
    "data.source",
    "data.tokenizer",
    "data.cache",
    "distill.teachers",
)
ALL_LINES = [
    *((where[1], line) for where, line in COMMAND_LINES.items()),
    *(
        (name.rpartition(".")[2].replace("-", "_"), f"train {{cfg}} --{name} {{path}}")
        for name in OVERRIDES
    ),
    ("target", "layout {cfg} --target {path}.json:8"),
    ("target", "layout {cfg} --target {path}"),
    ("layout", "layout {cfg} --layout {path}.py:NAME"),
    ("layout", "train {cfg} --layout {path}.py:NAME"),
    ("argument target", "convert {ckpt} {path} --verify"),
]
CONFIG = """
from configs.models import flash
from v4jax.train.config import TrainConfig
def get_config():
    return TrainConfig(
        model=flash(), run_dir="r", steps=1, batch_size=1, seq_len=8, learning_rate=1e-3,
        warmup_steps=0,
    )
"""


def test_every_path_of_the_parser_is_walked():
    (commands,) = [a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)]
    found = {
        (name, action.option_strings[0] if action.option_strings else action.metavar or action.dest)
        for name, sub in commands.choices.items()
        for action in sub._actions
        if action.type in (PATH, CHECKPOINT, PLACE, NEW_FILE, ADAPTER)
    }
    assert found == set(COMMAND_LINES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write(tmp_path_factory.mktemp("ckpt") / "model")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "cfg.py"
    path.write_text(CONFIG)
    return path


@pytest.mark.parametrize("address", [BUCKET, "s3:/bucket/x"])
@pytest.mark.parametrize(("name", "line"), ALL_LINES, ids=[line for _, line in ALL_LINES])
def test_every_command_refuses_a_bucket_in_one_line(
    name, line, address, checkpoint, config_file, empty_folder, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(ROOT)
    np.save("t.npy", np.zeros((1, 4), np.int32))
    before = {
        path: path.read_bytes()
        for path in (*empty_folder.rglob("*"), *checkpoint.rglob("*"))
        if path.is_file()
    }
    code = cli.main(line.format(path=address, ckpt=checkpoint, cfg=config_file).split())
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert name in err and f"got '{address}" in err
    assert "buckets (gs://, s3://, ...)" in err or NEEDS in err
    assert [path.name for path in empty_folder.iterdir()] == ["t.npy"]
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "score {ckpt} --tokens t.npy --out none/o.npz",
            "argument --out: got none/o.npz; its folder none does not exist",
        ),
        (
            "score {ckpt} --tokens t.npy --out .",
            "argument --out: got .; must be a file, and is a folder",
        ),
        (
            "layout {cfg} --report none/x.html",
            "argument --report: got none/x.html; its folder none does not exist",
        ),
        (
            "layout {cfg} --stablehlo none/x",
            "argument --stablehlo: got none/x; its folder none does not exist",
        ),
        (
            "layout --measure none/x.json",
            "argument --measure: got none/x.json; its folder none does not exist",
        ),
        ("train {cfg} --run-dir t.npy", "run_dir: got t.npy, which is not a folder"),
        ("train {cfg} --run-dir t.npy/run", "run_dir: got t.npy/run;"),
        ("train {cfg} --run-dir=", "run_dir: got ''; must not be empty"),
        ("train {cfg} --data.cache t.npy", "cache: got t.npy, which is not a folder"),
        ("train {cfg} --init-from none", "none: no such file"),
        ("convert {ckpt} t.npy/out", "t.npy, which is not a folder"),
        (
            "generate {ckpt} --tokens 1 --prefix-cache t.npy",
            "prefix cache: got t.npy, which is not a folder",
        ),
        ("score t.npy --tokens t.npy --out o.npz", "t.npy: is a file; must be a checkpoint folder"),
    ],
)
def test_a_place_of_the_wrong_kind_is_refused_before_work(
    line, words, checkpoint, config_file, empty_folder, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr("v4jax.train.prepare.tokenizer_of", lambda data: pytest.fail("work began"))
    monkeypatch.setattr("v4jax.planner.measure.measure", lambda: pytest.fail("work began"))
    np.save("t.npy", np.zeros((1, 4), np.int32))
    code = cli.main(line.format(ckpt=checkpoint, cfg=config_file).split())
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert words in err
    assert [path.name for path in empty_folder.iterdir()] == ["t.npy"]


# ---- Python --------------------------------------------------------------------------------------

CALLS = {
    "load": (v4jax.load, "path"),
    "from_json": (v4jax.ModelConfig.from_json, "path"),
    "save_safetensors": (lambda path: v4jax.save_safetensors(CFG, PARAMS, path), "directory"),
    "save_safetensors source": (
        lambda path: v4jax.save_safetensors(CFG, PARAMS, "out", source=path),
        "source",
    ),
    "load_onto": (lambda path: load_onto(path, CFG, "float32", {}), "directory"),
    "load_safetensors": (load_safetensors, "directory"),
    "open_safetensors": (open_safetensors, "directory"),
    "read_config": (read_config, "directory"),
    "carried_files": (carried_files, "directory"),
    "Store": (Store, "directory"),
    "is_run": (is_run, "directory"),
    "check_config": (lambda path: check_config(path, CFG), "directory"),
    "write_config": (lambda path: write_config(path, CFG), "directory"),
    "write_config source": (lambda path: write_config("run", CFG, path), "source"),
    "convert source": (lambda path: convert(path, "out"), "source"),
    "convert target": (lambda path: convert("in", path), "target"),
    "compare first": (lambda path: compare(path, "b"), "first"),
    "open_checkpoint": (open_checkpoint, "directory"),
    "score checkpoint": (lambda path: score(path, "t.npy", "o.npz"), "checkpoint"),
    "score out": (lambda path: score("in", "t.npy", path), "out"),
    "read_tokens": (lambda path: read_tokens(path, 9), "tokens"),
    "load_tokenizer": (load_tokenizer, "tokenizer"),
    "HuggingFaceTokenizer": (HuggingFaceTokenizer, "path"),
    "save": (lambda path: ByteTokenizer().save(path), "directory"),
    "TrainConfig run_dir": (lambda path: run_of(run_dir=path), "run_dir"),
    "TrainConfig init_from": (lambda path: run_of(init_from=path), "init_from"),
    "DataConfig source": (lambda path: DataConfig(source=path), "source"),
    "DataConfig cache": (lambda path: DataConfig(cache=path), "cache"),
    "DataConfig tokenizer": (lambda path: DataConfig(tokenizer=path), "tokenizer"),
    "mixture": (lambda path: DataConfig(mixture=(Source(path=path),)), "path"),
    "evaluate_on": (lambda path: DataConfig(evaluate_on=(Source(path=path, name="b"),)), "path"),
    "check_store": (lambda path: check_store(path, 1), "prefix cache"),
    "rollout": (
        lambda path: rollout(
            CFG, PARAMS, [[1]], Plan(samples=1, max_new_tokens=1), path, decoding=DecodeConfig()
        ),
        "log",
    ),
    "write_summary": (write_summary, "run"),
    "read_metrics": (read_metrics, "run"),
    "target_of": (target_of, "target"),
    "hardware_of": (lambda path: hardware_of(f"{path}.json"), "target"),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_function_refuses_a_bucket_and_names_its_argument(call, empty_folder):
    function, name = CALLS[call]
    with pytest.raises(ValueError, match=rf"(^|: ){name}: got '{BUCKET}.*({WORDS[:30]}|{NEEDS})"):
        function(BUCKET)
    assert not list(empty_folder.iterdir())


def test_home_is_understood_by_commands_and_functions(tmp_path, monkeypatch, capsys, empty_folder):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    write(home / "model")
    (home / "chip.json").write_text((ROOT / "v4jax/planner/cpu.json").read_text())
    ByteTokenizer().save("~/model")
    assert (
        v4jax.ModelConfig.from_json("~/model")
        == v4jax.ModelConfig.from_json("~/model/config.json")
        == CFG
    )
    assert (
        load_tokenizer("~/model").vocab_size
        == tokenizer_of(DataConfig(tokenizer="~/model")).vocab_size
    )
    assert open_safetensors("~/model").cfg == CFG and not is_run("~/model")
    assert target_of("~/chip.json:8").devices == 8
    assert cli.main(["convert", "~/model", "~/out"]) == 0
    assert cli.main(["cost", "~/model/config.json", "--json"]) == 0
    np.save(home / "t.npy", np.zeros((1, 4), np.int32))
    assert (
        read_tokens("~/t.npy", 9).shape == (1, 4)
        and file_to_write("~/o.npz", "out") == home / "o.npz"
    )
    assert (home / "out/config.json").is_file()
    (home / "run").mkdir()
    (home / "run/metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    assert read_metrics("~/run") == [{"step": 1, "loss": 1.0}]
    with pytest.raises(ValueError, match=f"{home}/run is not empty and holds no v4jax run"):
        train(run_of(run_dir="~/run"))
    assert not list(empty_folder.iterdir())
