"""The config.json of a run's directory, which says whose weights are there.

Next file to read: v4jax/checkpoint/store_params.py.
"""

import json

from v4jax import storage
from v4jax.checkpoint.atomic import write_text
from v4jax.checkpoint.carried import CARRIED
from v4jax.checkpoint.store import is_run
from v4jax.config import ModelConfig
from v4jax.config.json_styles import read_config_json
from v4jax.storage import WRITER, Place, checkpoint_path, place

_BEFORE = (CARRIED, WRITER)
"""What a process that was killed may have written before config.json."""


def check_config(directory, cfg: ModelConfig) -> None:
    """Refuses a directory that is neither empty nor a run of this model. Changes nothing.

    Raises:
      ValueError: the directory belongs to another model (names the first field that differs) or
        holds something else.
    """
    directory = place(directory, "directory")
    if (directory / "config.json").exists():
        _check_is_no_export(directory)
        _check_same_model(directory, cfg)
    elif directory.exists() and any(path.name not in _BEFORE for path in directory.iterdir()):
        raise ValueError(
            f"{directory} is not empty and holds no v4jax run; choose another run directory"
        )


def write_config(directory, cfg: ModelConfig, source: str = "", anew: bool = False) -> None:
    """Writes config.json, or checks that the one there describes the same model.

    The caller checks first what else is in the directory (check_config).

    Args:
      source: the checkpoint of this model that the weights come from. Its config.json says more
        than `cfg` does, so it is the base of the new one.
      anew: replace the one there, if it describes the same model.

    Raises:
      ValueError: the directory belongs to another model.
    """
    directory = place(directory, "directory")
    path = directory / "config.json"
    if path.exists():
        _check_same_model(directory, cfg)
        if not anew:
            return
    raw = cfg.to_dict()
    if source:
        raw = read_config_json(checkpoint_path(source, "source") / "config.json")
    storage.make_folder(directory)
    write_text(path, json.dumps(raw, indent=2) + "\n")


def _check_is_no_export(directory: Place) -> None:
    """Refuses safetensors, which a run's checkpoints beside them would hide."""
    if is_run(directory):
        return
    found = [path.name for path in directory.iterdir() if path.suffix == ".safetensors"]
    if found:
        raise ValueError(
            f"{directory} holds {min(found)} and no v4jax run; choose another run directory, and "
            "train from these weights by init_from"
        )


def _check_same_model(directory: Place, cfg: ModelConfig) -> None:
    old = ModelConfig.from_json(directory / "config.json")
    if name := cfg.difference(old):
        theirs, ours = old.to_dict().get(name), cfg.to_dict().get(name)
        raise ValueError(
            f"{directory} holds a run of another model: {name} is {theirs} there, {ours} here; "
            "choose another run directory"
        )
