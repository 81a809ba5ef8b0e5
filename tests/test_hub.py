"""Models of the Hub by name: org/name[@revision] is one commit, checked, or refused in one line."""

import json
import logging
import re

import jax
import numpy as np
import pytest
from exports import CFG, PARAMS, assert_same, write
from hub import FIRST, SECOND, Hub

import v4jax
from v4jax import storage
from v4jax.api import place_on
from v4jax.cli import main as cli
from v4jax.storage import checkpoint_name, is_remote
from v4jax.tokenizer import ByteTokenizer, load_tokenizer
from v4jax.train.config import TrainConfig
from v4jax.train.initial import check_source_model, fresh
from v4jax.train.prepare import write_run
from v4jax.train.step import state_shardings

pytest.importorskip("huggingface_hub", reason="needs the extra hub")
NAME = "deepseek-ai/tiny"
WEIGHTS = "model.safetensors"
BESIDE = {
    "README.md": b"read",
    "inference/config.json": b"{}",
    "encoding/encoding_dsv4.py": b'REASONING_EFFORT_PROMPTS = {"high": "..."}\n' * 100,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint with a tokenizer, and what a release has beside it."""
    folder = write(tmp_path_factory.mktemp("model") / "model")
    ByteTokenizer().save(folder)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found | BESIDE | {"a.bin": b"b" * 2000}


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    older = files | {"config.json": json.dumps(CFG.replace(eos_token_id=7).to_dict()).encode()}
    repos = {NAME: {FIRST: older, SECOND: files}, "org/gated": {FIRST: files}}
    hub = Hub(repos, {NAME: SECOND, "org/gated": FIRST}, gated=("org/gated",))
    with hub, hub.used(monkeypatch, tmp_path / "cache"):
        yield hub


def downloads(hub):
    return [
        path.rpartition("/")[2]
        for method, path, _ in hub.requests
        if method == "GET" and "/resolve/" in path
    ]


def on_weights(act, times):
    """A rule that breaks the first downloads of the weights."""
    left = [act] * times

    def rule(method, path):
        return left.pop() if left and method == "GET" and path.endswith(WEIGHTS) else None

    return rule


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", ["org/name", "org/name@v1", "org/name@refs/pr/1", "hf://a/b", "hf://a/b@main"]
)
def test_a_name_is_of_the_hub(given, hub):
    assert str(checkpoint_name(given)) == f"hf://{given.removeprefix('hf://')}"


def test_what_is_there_or_is_called_as_no_model_is_a_path(hub, tmp_path):
    (tmp_path / "org/name").mkdir(parents=True)
    for given in (
        "org/name",
        "a/b.json",
        "./a/b",
        "../a/b",
        "a",
        "a/b/c",
        tmp_path / "a/b",
        "/a/b",
    ):
        assert not is_remote(checkpoint_name(given)), given
    assert hub.requests == []


def test_the_missing_package_is_named(hub, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^path: got 'hf://org/name'; .*'v4jax\[hub\]'$"):
        v4jax.load("org/name")


# ---- what is read --------------------------------------------------------------------------------


def test_load_reads_the_model_that_the_name_means_and_says_which(hub, tmp_path, capsys):
    cfg, params = v4jax.load(NAME)
    assert cfg == CFG
    assert_same(params, PARAMS)
    folder = tmp_path / "cache/hub/models--deepseek-ai--tiny/snapshots" / SECOND
    assert (
        capsys.readouterr().err == f"v4jax: hf://{NAME}: commit {SECOND} of the Hub, in {folder}\n"
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "encoding",
        "inference",
        WEIGHTS,
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert v4jax.load(f"{NAME}@{FIRST}")[0].eos_token_id == 7


def test_small_questions_download_no_weights(hub):
    assert v4jax.ModelConfig.from_json(NAME) == CFG
    assert load_tokenizer(NAME).vocab_size == ByteTokenizer().vocab_size
    assert WEIGHTS not in downloads(hub) and "config.json" in downloads(hub)
    v4jax.load(NAME)
    assert downloads(hub).count(WEIGHTS) == downloads(hub).count("tokenizer.json") == 1


def test_a_name_is_one_commit_while_the_process_runs(hub):
    assert v4jax.ModelConfig.from_json(NAME).eos_token_id == 1
    hub.heads[NAME] = FIRST
    assert v4jax.load(NAME)[0].eos_token_id == 1
    hub.forget()
    assert v4jax.load(NAME)[0].eos_token_id == 7


def test_what_is_in_the_cache_needs_no_hub(hub, monkeypatch):
    v4jax.load(NAME)
    hub.forget()
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_same(v4jax.load(NAME)[1], PARAMS)
    assert hub.requests == []


@pytest.mark.parametrize("line", ["convert {} out --dtype bfloat16 --json", "cost {} --json"])
def test_commands_take_the_name(line, hub, tmp_path, capsys):
    assert cli.main(line.format(NAME).split()) == 0
    out, err = capsys.readouterr()
    assert f"hf://{NAME}: commit {SECOND}" in err
    if line.startswith("convert"):
        assert json.loads(out)["source"] == f"hf://{NAME}@{SECOND}"
        assert (tmp_path / "out/tokenizer.json").exists()
        for name, content in BESIDE.items():
            assert (tmp_path / "out" / name).read_bytes() == content


@pytest.mark.parametrize("command", ["generate", "score"])
def test_commands_check_their_flags_before_they_download_weights(command, hub, monkeypatch):
    class Loaded(Exception):
        pass

    def load(name, *_):
        assert WEIGHTS not in downloads(hub)
        assert v4jax.load(name)[0] == CFG
        raise Loaded

    np.save("t.npy", np.zeros((1, 4), np.int32))
    module = {"generate": "v4jax.generate.command", "score": "v4jax.score"}[command]
    monkeypatch.setattr(f"{module}.load", load)
    flags = {"generate": "--tokens 1", "score": "--tokens t.npy --out o.npz"}[command]
    with pytest.raises(Loaded):
        cli.main([command, NAME, *flags.split()])


def test_a_run_begins_from_a_name_and_writes_the_commit_down(hub, tmp_path):
    cfg = TrainConfig(
        model=CFG,
        run_dir=str(tmp_path / "run"),
        init_from=NAME,
        steps=1,
        batch_size=1,
        seq_len=8,
        learning_rate=1e-3,
        warmup_steps=0,
    )
    mesh, rules = place_on(None, None)
    assert_same(jax.device_get(fresh(cfg, state_shardings(cfg, rules, mesh)).public), PARAMS)
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", cfg, ByteTokenizer(), storage.Claim(tmp_path / "run"))
    assert (tmp_path / "run/init_from.txt").read_text() == f"hf://{NAME}@{SECOND}\n"
    check_source_model(cfg)


# ---- faults --------------------------------------------------------------------------------------


def one_line(capsys, name, code=2):
    assert cli.main(["generate", name, "--tokens", "1"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("org/none", "no such folder here, and no such model on the Hub"),
        (
            "org/gated",
            "is a gated model: accept its terms at http://127.0.0.1:.*/org/gated, and log",
        ),
        (f"{NAME}@nope", "the model has no revision 'nope'"),
    ],
)
def test_a_model_that_cannot_be_had_is_refused_in_one_line(name, words, hub, capsys):
    err = one_line(capsys, name)
    assert err.startswith(f"v4jax: hf://{name}: ") and re.search(words, err), err


def test_without_the_hub_the_reason_is_named(hub, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = "no such folder here, nor in the Hub's cache (HF_HUB_OFFLINE is set)"
    assert words in one_line(capsys, NAME)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again_and_then_named(status, hub, capsys):
    left = [1] * 3
    hub.rule = lambda method, path: ("status", status) if left and left.pop() else None
    assert v4jax.load(NAME)[0] == CFG and not left
    hub.forget()
    hub.rule = lambda method, path: ("status", status)
    capsys.readouterr()
    assert f"hf://{NAME}@{FIRST}: " in one_line(capsys, f"{NAME}@{FIRST}", code=1)


def test_an_answer_cut_short_is_asked_again(hub):
    hub.rule = on_weights(("cut", 2000), times=1)
    assert_same(v4jax.load(NAME)[1], PARAMS)


def test_a_flipped_bit_is_found_and_the_file_downloaded_once_more(hub, caplog):
    hub.rule = on_weights(("flip", 2000), times=1)
    with caplog.at_level(logging.WARNING):
        assert_same(v4jax.load(NAME)[1], PARAMS)
    assert "has another sha256; once more" in caplog.text
    hub.forget()
    hub.requests.clear()
    v4jax.load(NAME)
    assert downloads(hub) == []


def test_a_file_that_stays_damaged_is_refused(hub):
    hub.rule = lambda method, path: (
        ("flip",) if method == "GET" and path.endswith(WEIGHTS) else None
    )
    with pytest.raises(OSError, match=f"{WEIGHTS}: was downloaded twice, and has another sha256"):
        v4jax.load(NAME)


def test_a_mistyped_path_names_the_folder_that_lacks_it(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    words = r"no such folder here \(the folder runs has no mine in it\), nor in the Hub's cache"
    with pytest.raises(ValueError, match=words):
        storage.checkpoint_path("runs/mine")
