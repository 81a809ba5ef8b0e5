"""The frozen base of adapters: named by its path and by a fingerprint of its weights.

Neither a run's checkpoints nor files of adapters hold the base, so both say which it is.

Next file to read: v4jax/train/initial.py.
"""

import hashlib
import json
from typing import NamedTuple

from v4jax import storage
from v4jax.checkpoint.atomic import write_text
from v4jax.checkpoint.store import CHECKPOINTS, is_run
from v4jax.storage import Place, folder_of_checkpoint, pinned

ADAPTER = "adapter"
"""The folder of a run's adapter, in PEFT's format."""
CONFIG_FILE = "adapter_config.json"
"""PEFT's file that makes a folder an adapter."""
BASE_FILE = "base.json"
"""Beside what was made from a base: its path (at a commit, if it is of the Hub) and fingerprint."""
_PIECE = 64 * 2**10


class Base(NamedTuple):
    """Which weights a base has.

    Attributes:
      path: where they were read.
      fingerprint: see `fingerprint`.
    """

    path: str
    fingerprint: str


def base_at(path: str | Place) -> Base:
    """The base at `path`, a checkpoint of any kind."""
    return Base(pinned(path), fingerprint(path))


def fingerprint(path: str | Place) -> str:
    """A hash of the weights of a checkpoint: names, sizes, and 64 KiB at three places of each file.

    So 160 GB are known by a few MB, read where they lie. Weights that were trained differ
    everywhere; a copy of the files has the same fingerprint.

    Raises:
      ValueError: no such folder, a run of adapters, or no weights there.
    """
    folder = folder_of_checkpoint(path, "init_from", weights=True)
    refuse_adapters(folder)
    if is_run(folder):
        steps = [int(one.name) for one in (folder / CHECKPOINTS).iterdir() if one.name.isdigit()]
        folder = folder / CHECKPOINTS / str(max(steps, default=0)) / "params"
        names = list(storage.listing(folder))
    else:
        names = [one.name for one in folder.iterdir() if one.suffix == ".safetensors"]
    if not names:
        raise ValueError(f"{path}: no weights there")
    found = hashlib.sha256()
    for name in sorted(names):
        size = storage.size(folder / name)
        found.update(f"{name} {size}\n".encode())
        for start in sorted({0, max(0, size // 2), max(0, size - _PIECE)}):
            found.update(storage.read(folder / name, start, _PIECE))
    return found.hexdigest()


def write_base(folder: Place, base: Base) -> None:
    """Writes BASE_FILE."""
    write_text(folder / BASE_FILE, json.dumps(base._asdict(), indent=2) + "\n")


def read_base(folder: Place) -> Base | None:
    """What BASE_FILE says; None without it.

    Raises:
      ValueError: it is not what `write_base` writes.
    """
    path = folder / BASE_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        return Base(str(found["path"]), str(found["fingerprint"]))
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a path and a fingerprint of base weights") from None


def refuse_adapters(folder: Place, right: str = "{base}") -> None:
    """Refuses a run of adapters or an adapter where a checkpoint is wanted: they lack its weights.

    Args:
      right: what to write instead, with {base} and {adapter} in it.

    Raises:
      ValueError: it is one; the message shows `right`.
    """
    is_adapter = (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()
    if not is_adapter and not is_run(folder):
        return
    base = read_base(folder)
    if is_adapter:
        what, adapter = "an adapter", str(folder)
    elif base is not None:
        what, adapter = "a run of adapters", f"{folder}/{ADAPTER}"
    else:  # a run of all weights
        return
    said = right.format(base="BASE" if base is None else base.path, adapter=adapter)
    raise ValueError(f"{folder}: {what}, which has no weights of its own; use its base: {said}")


def check_same_base(what: str, wanted: Base, given: Base) -> None:
    """Raises ValueError if `given` is not the base that `what` was made from."""
    if wanted.fingerprint != given.fingerprint:
        raise ValueError(
            f"{what} belongs to the base {wanted.path} ({wanted.fingerprint[:12]}); "
            f"{given.path} has other weights ({given.fingerprint[:12]})"
        )
