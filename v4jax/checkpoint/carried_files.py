"""Files beside the weights that exports, stores and runs take along, with their bytes.

An export has them under their own names. A run or store has the tokenizer, generation_config.json
and the like, and encoding/, under their own names too, since commands read them there; others are
in carried/files/.

Next file to read: v4jax/checkpoint/export.py.
"""

import pathlib
import re
from typing import NamedTuple

from v4jax import storage
from v4jax.checkpoint.carried import CARRIED
from v4jax.checkpoint.files import INDEX_FILE
from v4jax.checkpoint.store import CHECKPOINTS, is_run
from v4jax.storage import Place, checkpoint_path
from v4jax.untrusted import file_below

ENCODING = "encoding"
"""Folder of a release for the code that encodes messages."""
FILES = "files"
_READ_HERE = re.compile(
    r"(tokenizer|generation_config|special_tokens_map|chat_template|vocab|merges|added_tokens)"
    r"[\w.]*\.(json|txt|model|jinja)$"
)
"""Files that commands read beside config.json."""
_WEIGHTS = re.compile(
    r".*(\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|npz)|\.index\.json)$"
)
_NOT = ("config.json", INDEX_FILE, "plan.json")


class CarriedFile(NamedTuple):
    """A file to copy: where it is, and its name below the folder, such as encoding/README.md."""

    path: Place
    name: str


def carried_files(directory) -> list[CarriedFile]:
    """The files that go along with a checkpoint's weights.

    They are all but config.json, weights in any format, hidden files, and folders that hold a
    checkpoint of their own. Of a run or store they are those that it was given.

    Raises:
      ValueError: one of them is not a regular file of the directory.
    """
    directory = checkpoint_path(directory, "directory")
    named = _of_run(directory) if is_run(directory) else _of_release(directory)
    try:
        return [
            CarriedFile(file_below(directory, where), name) for where, name in sorted(named.items())
        ]
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{directory}: {error}") from None


def in_run(name: str) -> str:
    """Where in a run or store a carried file is."""
    here = _READ_HERE.match(name) is not None or name.startswith(f"{ENCODING}/")
    return name if here else f"{CARRIED}/{FILES}/{name}"


def copy_to(files: list[CarriedFile], folder: Place, is_run: bool = False) -> None:
    """Copies carried files into an export, or into a run or store."""
    for path, name in files:
        target = folder / (in_run(name) if is_run else name)
        storage.make_folder(target.parent)
        storage.copy(path, target)


def _of_run(directory: Place) -> dict[str, str]:
    """Place below a run -> name in an export. The checkpoints' own many files are not listed."""
    found = {path.name: path.name for path in directory.iterdir() if _READ_HERE.match(path.name)}
    for folder, prefix in ((ENCODING, f"{ENCODING}/"), (f"{CARRIED}/{FILES}", "")):
        below = storage.listing(directory / folder)
        found |= {f"{folder}/{name}": f"{prefix}{name}" for name in below}
    return found


def _of_release(directory: Place) -> dict[str, str]:
    names = [name for name in _names_below(directory) if not _is_hidden(name)]
    others = {name.split("/")[0] for name in names if _is_checkpoint_of_its_own(name)}
    kept = [name for name in names if "/" not in name or name.split("/")[0] not in others]
    return {name: name for name in kept if name not in _NOT and not _WEIGHTS.match(name)}


def _names_below(directory: Place) -> list[str]:
    """All files below a folder, and on a disk whatever else has the place of a file in it."""
    found = set(storage.listing(directory))
    if isinstance(directory, pathlib.Path):
        found |= {path.name for path in directory.iterdir() if not path.is_dir()}
    return sorted(found)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _is_checkpoint_of_its_own(name: str) -> bool:
    folders = name.split("/")[:-1]
    return bool(folders) and (_WEIGHTS.match(name) is not None or CHECKPOINTS in folders)
