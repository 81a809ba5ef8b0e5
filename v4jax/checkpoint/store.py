"""A run's directory: config, tokenizer and Orbax checkpoints that a run resumes from, and their weights alone.

    RUN/config.json            architecture, official style
    RUN/tokenizer.json         how text becomes tokens
    RUN/checkpoints/STEP/      params (the public dict), optimizer, progress, data position
    RUN/metrics.jsonl, ...     written by the training loop

A checkpoint appears under its name only when it is complete (Orbax renames it), so a crash leaves nothing half-written.

Next file to read: v4jax/train/loop.py.
"""

import json
import logging
import os
import pathlib
import tempfile
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from v4jax.config import ModelConfig

CHECKPOINTS = "checkpoints"
logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax reports every file it touches at INFO


class Store:
    """The checkpoints of one directory. Use as a context manager: leaving it waits for saves under way."""

    def __init__(self, directory, keep: int = 2, writes: bool = False):
        """`keep`: newest checkpoints kept. `writes`: this process trains here, so leftovers of killed saves are its own."""
        policies = ocp.training.save_decision_policies, ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            pathlib.Path(directory).absolute() / CHECKPOINTS,
            # The default policy skips a save, silently, while another one runs; the caller decides when to save.
            save_decision_policy=policies[0].FixedIntervalPolicy(1),
            preservation_policy=policies[1].preservation_policy_lib.LatestN(keep),
            cleanup_tmp_directories=writes,  # a reader must not touch a save under way
        )

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *error) -> None:
        self._checkpointer.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def path(self, step: int) -> pathlib.Path:
        """Directory of a step's checkpoint."""
        return pathlib.Path(self._checkpointer.directory) / str(step)

    def save(self, step: int, items: dict[str, Any]) -> None:
        """Starts an asynchronous save of named trees and iterators.

        Raises:
          RuntimeError: Orbax declined to save.
        """
        if self._checkpointer.save_checkpointables_async(step, items) is None:
            raise RuntimeError(f"checkpoint {step} was not saved to {self._checkpointer.directory}")

    def load(self, step: int, items: dict[str, Any]) -> dict[str, Any]:
        """The named items of a checkpoint; trees of jax.ShapeDtypeStruct say shapes, dtypes and shardings."""
        return self._checkpointer.load_checkpointables(step, items)


def is_run(directory) -> bool:
    """Whether `directory` is a v4jax run or store (as opposed to a directory of safetensors)."""
    return (pathlib.Path(directory) / CHECKPOINTS).is_dir()


def load_store_params(directory, abstract) -> Any:
    """The public parameter dict of the newest checkpoint, placed and typed as `abstract` says.

    Raises:
      ValueError: no complete checkpoint, or one of another model (naming the first array that differs).
    """
    with Store(directory) as store:
        step = store.latest
        if step is None:
            raise ValueError(f"{directory}: no complete checkpoint in {CHECKPOINTS}/")
        check_same_arrays(store.path(step), abstract)
        return store.load(step, {"params": abstract})["params"]


def check_same_arrays(path, abstract) -> None:
    """Raises ValueError where the stored params differ from `abstract` in names, shapes or dtypes (Orbax would cast)."""
    stored = ocp.metadata(path, "params").metadata
    have = {_name(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(stored)}
    want = {_name(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    for name in sorted(have.keys() | want.keys()):
        if name not in have or name not in want:
            raise ValueError(f"{path}: array {name} is {'missing' if name in want else 'not part of the model'}")
        if tuple(have[name].shape) != tuple(want[name].shape):
            raise ValueError(f"{path}: array {name} has shape {tuple(have[name].shape)}; the model needs {want[name].shape}")


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_config(directory, cfg: ModelConfig) -> None:
    """Refuses a directory that `write_config` would refuse; changes nothing.

    Raises:
      ValueError: the directory belongs to another model (names the first field that differs), or to something else.
    """
    directory = pathlib.Path(directory)
    path = directory / "config.json"
    if path.exists():
        old, new = ModelConfig.from_json(path).to_dict(), cfg.to_dict()
        for name in new.keys() | old.keys():
            if old.get(name) != new.get(name):
                raise ValueError(
                    f"{directory} holds a run of another model: {name} is {old.get(name)} there, {new.get(name)} here; "
                    "choose another run directory"
                )
    elif directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty and holds no v4jax run; choose another run directory")


def write_config(directory, cfg: ModelConfig) -> None:
    """Writes config.json, or finds that the one there describes the same model.

    Raises:
      ValueError: see check_config.
    """
    check_config(directory, cfg)
    path = pathlib.Path(directory) / "config.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(cfg.to_dict(), indent=2) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
