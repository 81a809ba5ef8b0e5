"""Where a checkpoint to read is: a folder here, one of a bucket, or a model of the Hub by its name.

Next file to read: v4jax/untrusted.py.
"""

import os
import re

from v4jax.storage.hub import commit_of, snapshot
from v4jax.storage.local import path_of_checkpoints
from v4jax.storage.places import Place, place
from v4jax.storage.remote import Remote

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_FILES = (".json", ".npy", ".py", ".safetensors")
"""How no model of the Hub is called, so that a mistyped file is not looked for there."""


def checkpoint_name(given: str | os.PathLike | Remote, what: str = "") -> Place:
    """The place that `given` names for reading; nothing is read or downloaded yet.

    A text org/name or org/name@revision is a model of the Hub if no such path exists here.

    Raises:
      ValueError: see place.
    """
    text = given if isinstance(given, str) else ""
    is_name = _HUB_NAME.fullmatch(text) and not text.endswith(_FILES)
    if is_name and not os.path.lexists(text):
        return place(f"hf://{text}", what)
    return place(given, what)


def checkpoint_path(
    given: str | os.PathLike | Remote, what: str = "", weights: bool = False
) -> Place:
    """`checkpoint_name` with a model of the Hub downloaded, or found in its cache.

    A bucket's folder, and what `streamed` returns, is read where it is.

    Args:
      weights: download its weights too; otherwise only config, tokenizer and other small files.

    Raises:
      ValueError: see checkpoint_name and hub.snapshot.
      OSError: the Hub is out of reach, or the disk is full.
    """
    found = checkpoint_name(given, what)
    if isinstance(found, Remote) and found.scheme == "hf" and not isinstance(given, Remote):
        return snapshot(found, weights)
    return found


def streamed(given: str | os.PathLike | Remote, what: str = "") -> Place:
    """`checkpoint_name` with a model of the Hub at one commit, to be read from there in ranges.

    Raises:
      ValueError, OSError: see checkpoint_path.
    """
    found = checkpoint_name(given, what)
    if not isinstance(found, Remote) or found.scheme != "hf":
        return found
    return Remote("hf", f"{found.key.partition('@')[0]}@{commit_of(found)}")


def pinned(given: str | os.PathLike | Remote) -> str:
    """What to write down of a checkpoint's origin: with its commit, if it is of the Hub.

    Raises:
      ValueError, OSError: see checkpoint_path.
    """
    return str(streamed(given))


def place_of_checkpoints(given: str | os.PathLike | Remote, what: str = "") -> Place:
    """`path_of_checkpoints`, or a bucket's folder, which Orbax reads and writes.

    Raises:
      ValueError: see path_of_checkpoints and place.
    """
    found = place(given, what)
    return found if isinstance(found, Remote) else path_of_checkpoints(found, what)


def folder_of_checkpoint(
    given: str | os.PathLike | Remote, what: str = "", weights: bool = False
) -> Place:
    """`checkpoint_path` of a folder that is there.

    Raises:
      ValueError: see checkpoint_path; or there is no such folder or bucket, or it is a file.
    """
    path = checkpoint_path(given, what, weights)
    if path.is_dir():
        return path
    if path.is_file() or (not isinstance(path, Remote) and os.path.lexists(path)):
        fault = "a file" if path.is_file() else "not a folder"
        raise ValueError(f"{path}: is {fault}; must be a checkpoint folder")
    raise ValueError(f"{path}: no such folder; expected config.json + safetensors, or a v4jax run")
