"""Where the numbers of a run go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

All of them are metric writers: `write(step, values)` and `close()`. The services are written to by
their own clients, imported only where they are used. What else a client does (its server, its keys,
whether it is offline) is set in its own way, by its environment variables.

Next file to read: v4jax/train/picture.py.
"""

import dataclasses
import importlib
import json
import logging
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any, Protocol

from v4jax.checkpoint.atomic import write_text

TRACKERS = ("wandb", "mlflow")
"""The services, by the names of their clients' modules and of the extras that install them."""
IDS = "trackers.json"
"""The file of a run with its identity in each tracker, so that a resumed run goes on there."""
PROJECT = "v4jax"
"""W&B's project, where WANDB_PROJECT does not name one, and MLflow's experiment, likewise."""


class MetricWriter(Protocol):
    """Takes the numbers of a run, step by step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes values of a step. Other calls may add to it; steps come again after a rollback."""

    def close(self) -> None:
        """Waits until everything is written."""


def tracker_names(text: str) -> tuple[str, ...]:
    """The trackers that `text` names, such as "wandb,mlflow"; none for "".

    Raises:
      ValueError: an unknown name, or one that comes twice.
    """
    names = tuple(text.split(",")) if text else ()
    if set(names) - set(TRACKERS) or len(set(names)) < len(names):
        raise ValueError(
            f"trackers: got {text!r}; must be some of {', '.join(TRACKERS)}, each once, separated "
            "by commas"
        )
    return names


def require_trackers(text: str) -> None:
    """Raises ValueError unless the clients of all trackers in `text` are installed."""
    for name in tracker_names(text):
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise _missing(name, str(error)) from None
        if module.__file__ is None:  # a folder of that name, such as W&B writes
            raise _missing(name, f"{name} here is a folder and no package")


def _missing(name: str, why: str) -> ValueError:
    return ValueError(f"trackers: {name} needs its client ({why}): pip install 'v4jax[{name}]'")


def open_trackers(cfg: Any, run: pathlib.Path) -> list[MetricWriter]:
    """The trackers of a run, with its TrainConfig's settings; a resumed run goes on in its own.

    Raises:
      ValueError: a client cannot begin, in its own words.
    """
    kinds = {"wandb": WeightsAndBiases, "mlflow": MLflow}
    ids = json.loads((run / IDS).read_text()) if (run / IDS).exists() else {}
    opened: list[MetricWriter] = []
    for name in tracker_names(cfg.trackers):
        try:
            writer = kinds[name](run, settings(cfg), ids.get(name))
        except Exception as error:  # each client has its own
            for other in opened:
                other.close()
            raise ValueError(f"trackers: {name} cannot begin: {error}") from error
        opened.append(writer)
        ids[name] = writer.identity
        write_text(run / IDS, json.dumps(ids) + "\n")
    return opened


def settings(cfg: Any, head: str = "") -> dict[str, Any]:
    """The fields of a configuration as one level of names and plain values.

    Example: TrainConfig(steps=3, data=DataConfig(seed=1)) has "steps": 3 and "data.seed": 1.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if dataclasses.is_dataclass(value):
            found |= settings(value, f"{head}{field.name}.")
        else:
            plain = isinstance(value, (bool, int, float, str)) or value is None
            found[f"{head}{field.name}"] = value if plain else str(value)
    return found


class TensorBoard:
    """Event files in a folder of the run."""

    def __init__(self, run: pathlib.Path, first: int):
        """first: the step of the next values; what the folder has from there on is void."""
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar for each value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """A text at a step."""
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases. WANDB_MODE=offline writes to RUN/wandb only."""

    def __init__(self, run: pathlib.Path, config: dict[str, Any], identity: str | None):
        """identity: of the run to go on with; None: a new one."""
        self._run = importlib.import_module("wandb").init(
            project=_environment("WANDB_PROJECT"),
            name=run.resolve().name,
            dir=str(run),
            config=config,
            id=identity,
            resume="allow",
        )
        self.identity: str = self._run.id
        # Its own count of steps never goes back, as a run does after a loss spike.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One point, whose x is `step`."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Waits until its server has everything."""
        self._run.finish()


class MLflow:
    """A run of MLflow, on the server or in the folder of MLFLOW_TRACKING_URI."""

    def __init__(self, run: pathlib.Path, config: dict[str, Any], identity: str | None):
        """identity: of the run to go on with; None: a new one."""
        self._client = importlib.import_module("mlflow").MlflowClient()
        if identity is not None:
            self._client.update_run(identity, status="RUNNING")
            self.identity: str = identity
        else:
            self.identity = self._begin(run.resolve().name, config)

    def _begin(self, run_name: str, config: dict[str, Any]) -> str:
        """A new run with the settings `config`; its identity."""
        name = _environment("MLFLOW_EXPERIMENT_NAME")
        experiment = self._client.get_experiment_by_name(name)
        key = experiment.experiment_id if experiment else self._client.create_experiment(name)
        identity: str = self._client.create_run(key, run_name=run_name).info.run_id
        for field, value in config.items():
            self._client.log_param(identity, field, value)
        return identity

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One batch of values. If the server does not take it, a warning says so, and the run goes
        on: metrics.jsonl has them all."""
        entities = importlib.import_module("mlflow.entities")
        now = int(1000 * time.time())
        batch = [entities.Metric(name, value, now, step) for name, value in values.items()]
        try:
            self._client.log_batch(self.identity, metrics=batch)
        except Exception as error:  # its stores raise what they like
            logging.getLogger("v4jax").warning("step %d is not in MLflow: %s", step, error)

    def close(self) -> None:
        """Marks the run as finished."""
        self._client.set_terminated(self.identity)


def _environment(name: str) -> str:
    return os.environ.get(name) or PROJECT
