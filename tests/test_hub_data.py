"""Data sets of the Hub by name, on a small hub on loopback: streamed, at one commit, resumed."""

import json
import sys

import pytest
from hub import FIRST, SECOND, Hub
from small_runs import small_run

from v4jax.data.config import DataConfig, Source
from v4jax.data.records import read_texts
from v4jax.train.loop import train
from v4jax.train.metrics_file import read_metrics

datasets = pytest.importorskip("datasets", reason="needs the extra datasets")
# It leaves sessions of its readers open.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
TEXTS = [f"document {i} " * 30 for i in range(20)]
ROWS = [json.dumps({"text": text, "other": 0}) + "\n" for text in TEXTS]
LINES = "".join(ROWS).encode()
HF = dict(source="org/set", format="hf", held_out=0.2)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    files = {
        "train.jsonl": LINES,
        "test.jsonl": "".join(ROWS[:5]).encode(),
        "README.md": b"a data set\n",
    }
    other = files | {"train.jsonl": LINES.replace(b"doc", b"Doc")}
    repos = {"org/set": {FIRST: files, SECOND: other}}
    repos["org/gated"] = repos["org/set"]
    with Hub(repos, dict.fromkeys(repos, FIRST), gated=("org/gated",)) as hub:
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        with hub.used(monkeypatch, tmp_path / "cache"):
            yield hub


def losses(run):
    return [(line["step"], line["loss"]) for line in read_metrics(run) if "loss" in line]


def test_the_rows_are_those_of_the_file_and_the_commit_is_said(hub, capsys):
    rows = list(read_texts(Source(path="org/set", format="hf")))
    assert [text for _, text in rows] == TEXTS
    assert rows[1][0] == f"hf://datasets/org/set@{FIRST}:2"
    assert f"hf://datasets/org/set: commit {FIRST} of the Hub" in capsys.readouterr().err
    test = list(read_texts(Source(path=f"org/set@{SECOND}", format="hf", split="default/test")))
    assert [text for _, text in test] == TEXTS[:5]


@pytest.mark.slow
def test_a_resumed_run_has_the_losses_of_one_on_a_file_and_refuses_another_commit(hub, tmp_path):
    (tmp_path / "file.jsonl").write_bytes(LINES)
    local = DataConfig(source=str(tmp_path / "file.jsonl"), format="jsonl", held_out=0.2)
    common = dict(log_every=1, checkpoint_every=2)
    train(small_run(None, tmp_path / "whole", data=local, **common))
    pinned = DataConfig(**HF | {"source": f"org/set@{FIRST}"})
    train(small_run(None, tmp_path / "run", data=pinned, steps=2, **common))
    train(small_run(None, tmp_path / "run", data=pinned, steps=3, **common))
    hub.forget()
    hub.heads["org/set"] = SECOND
    with pytest.raises(ValueError, match=f"{FIRST}.*{SECOND}|{SECOND}.*{FIRST}") as error:
        train(small_run(None, tmp_path / "run", data=DataConfig(**HF), **common))
    assert "\n" not in str(error.value)
    train(small_run(None, tmp_path / "run", data=pinned, **common))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"path": "org/none"}, "hf://datasets/org/none: no such data set on the Hub"),
        ({"path": "org/gated"}, "hf://datasets/org/gated: is a gated data set"),
        ({"path": "org/set@x"}, "the data set has no revision 'x'"),
        ({"path": "org/set", "split": "dev"}, "split 'dev' cannot be read: .*dev"),
        ({"path": "org/set", "column": "tekst"}, "has no column 'tekst'; there are: other, text"),
        ({"path": "./set"}, "path: got './set'; must be org/name or org/name@revision"),
        ({"path": "org/set", "split": "a/b/c"}, "split: got 'a/b/c'; must be a split, or"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(hub, given, words):
    with pytest.raises(ValueError, match=words) as error:
        list(read_texts(Source(format="hf", **given)))
    assert "\n" not in str(error.value)


def test_the_package_and_the_format_are_named(monkeypatch):
    with pytest.raises(ValueError, match="a data set of the Hub: org/name, and format hf"):
        Source(path="hf://datasets/org")
    monkeypatch.setitem(sys.modules, "datasets", None)
    words = r"format hf needs the package datasets; pip install 'v4jax\[datasets\]'"
    with pytest.raises(ValueError, match=words):
        Source(path="org/set", format="hf")
    with pytest.raises(ValueError, match="split: got 'test' and format 'jsonl'; only a data set"):
        Source(path="x", format="jsonl", split="test")
