"""The numbers of a run go to every metric writer; clients are needed only if they are asked for."""

import dataclasses
import json
import sys
import types

import pytest
from trees import small_config

from v4jax.data.config import DataConfig
from v4jax.train import report
from v4jax.train.config import TrainConfig
from v4jax.train.loop import train
from v4jax.train.metrics_file import read_metrics
from v4jax.train.report import Reporter
from v4jax.train.stability import LossHistory
from v4jax.train.trackers import IDS, open_trackers, require_trackers, settings

METRICS = {"loss": 2.5, "expert_load_max": 1.5}


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "matmul_rate", lambda dtype: 1.0)
    return TrainConfig(
        model=small_config(vocab_size=260),
        data=DataConfig(),
        run_dir=str(tmp_path),
        steps=9,
        batch_size=1,
        seq_len=8,
        learning_rate=1e-3,
        warmup_steps=1,
    )


def tell(cfg, folder, step: int) -> None:
    """A start of the run that reports two steps and goes back by one."""
    with Reporter(folder, cfg, step, LossHistory()) as reporter:
        reporter.step(step + 1, dict(METRICS))
        reporter.evaluation(step + 1, {"held_out_nll": float("nan")})
        reporter.rollback(step, LossHistory(rollbacks=1, skipped=((1, 2),)), step + 1, "x", [1.0])
        reporter.step(step + 1, dict(METRICS))


class StandIn(types.ModuleType):
    """The calls of W&B's client that its documentation describes."""

    def __init__(self):
        super().__init__("wandb")
        self.__file__, self.calls, self.id = "wandb", [], "abc"

    def init(self, **options):
        self.calls.append(("init", options))
        return self

    def __getattr__(self, name):
        return lambda *rest, **more: self.calls.append((name, *rest, more))


def test_a_tracker_gets_what_the_file_gets_and_a_resumed_run_goes_on_in_it(
    cfg, tmp_path, monkeypatch
):
    client = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", client)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    cfg = dataclasses.replace(cfg, trackers="wandb")
    require_trackers(cfg.trackers)
    tell(cfg, tmp_path, 0)
    first = client.calls[0][1]
    assert (first["id"], first["resume"], first["project"]) == (None, "allow", "mine")
    assert first["config"]["steps"] == 9 and first["config"]["model.vocab_size"] == 260
    logged = [call[1] for call in client.calls if call[0] == "log"]
    assert [point["step"] for point in logged] == [1, 1, 1]
    assert logged[0]["loss"] == 2.5 and "held_out_nll" in logged[1] and logged[2]["loss"] == 2.5
    assert [call[0] for call in client.calls].count("init") == 1  # a rollback opens no second run
    assert client.calls[-1][0] == "finish"
    assert json.loads((tmp_path / IDS).read_text()) == {"wandb": "abc"}
    client.calls.clear()
    tell(cfg, tmp_path, 1)
    assert client.calls[0][1]["id"] == "abc"
    json.dumps(settings(cfg))


def test_a_client_that_cannot_begin_is_one_error(cfg, tmp_path, monkeypatch):
    client = StandIn()
    monkeypatch.setattr(client, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("no key")))
    monkeypatch.setitem(sys.modules, "wandb", client)
    with pytest.raises(ValueError, match="trackers: wandb cannot begin: no key"):
        open_trackers(dataclasses.replace(cfg, trackers="wandb"), tmp_path)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
@pytest.mark.parametrize("missing", ["module", "package"])
def test_a_missing_client_names_the_extra_before_any_work(
    cfg, tmp_path, monkeypatch, name, missing
):
    there = types.ModuleType(name)
    there.__file__ = None  # what a folder called wandb is to Python
    monkeypatch.setitem(sys.modules, name, None if missing == "module" else there)
    again = dataclasses.replace(cfg, trackers=name, run_dir=str(tmp_path / "run"))
    with pytest.raises(
        ValueError, match=rf"{name} needs its client .*pip install 'v4jax\[{name}\]'"
    ):
        train(again)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["tensorboard", "wandb,wandb", "wandb, mlflow", ","])
def test_unknown_trackers_are_refused(cfg, text):
    with pytest.raises(ValueError, match=f"trackers: got '{text}'; must be some of wandb, mlflow"):
        dataclasses.replace(cfg, trackers=text)


@pytest.mark.filterwarnings("ignore")  # those of the client
def test_wandb_offline(cfg, tmp_path, monkeypatch):
    pytest.importorskip("wandb.sdk", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = dataclasses.replace(cfg, trackers="wandb")
    require_trackers(cfg.trackers)
    for start in (0, 1):
        tell(cfg, tmp_path, start)
    identity = json.loads((tmp_path / IDS).read_text())["wandb"]
    files = list((tmp_path / "wandb").glob(f"offline-run-*/run-{identity}.wandb"))
    content = b"".join(path.read_bytes() for path in files)
    assert files and b"held_out_nll" in content and b"loss" in content


@pytest.mark.filterwarnings("ignore")  # those of the client
def test_mlflow_in_a_folder(cfg, tmp_path, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking", reason="needs the extra mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    cfg = dataclasses.replace(cfg, trackers="mlflow")
    require_trackers(cfg.trackers)
    for start in (0, 1):
        tell(cfg, tmp_path, start)
    client = tracking.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert found.info.run_id == json.loads((tmp_path / IDS).read_text())["mlflow"]
    assert found.info.status == "FINISHED" and found.data.params["steps"] == "9"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [
        (1, 2.5),
        (1, 2.5),
        (2, 2.5),
        (2, 2.5),
    ]
    assert [line["loss"] for line in read_metrics(tmp_path) if "loss" in line] == [2.5, 2.5]


@pytest.mark.filterwarnings("ignore")  # those of the client
def test_a_server_that_fails_does_not_end_the_run(cfg, tmp_path, monkeypatch, caplog):
    tracking = pytest.importorskip("mlflow.tracking", reason="needs the extra mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    def fail(*_, **__):
        raise ConnectionError("no route")

    (writer,) = open_trackers(dataclasses.replace(cfg, trackers="mlflow"), tmp_path)
    monkeypatch.setattr(tracking.MlflowClient, "log_batch", fail)
    writer.write(3, METRICS)
    assert "step 3 is not in MLflow: no route" in caplog.text
