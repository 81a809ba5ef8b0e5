"""Opens files that others made: regular files of one directory, JSON without repeated keys.

Anything else is refused with an error that says why.

Next file to read: v4jax/config/model.py.
"""

import json
import pathlib
import stat
from typing import Any

from v4jax import storage
from v4jax.storage import Place, Remote

_LONGEST_JSON = 256 * 2**20
"""Bytes; the index of V4-Pro has about 8 million."""


def file_in(directory: Place, name: str) -> Place:
    """`directory / name`, which must be a regular file in that directory.

    A link may lead to another file of the directory or, in the cache of huggingface_hub, from
    snapshots/REVISION to ../../blobs.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a name or link that leads elsewhere, or something that is not a regular file
        (reading a pipe would never end).
    """
    if pathlib.PurePath(name).name != name or "\0" in name:
        raise ValueError(f"got file {name!r}; must be a file name in this directory")
    if isinstance(directory, Remote):
        return _object_in(directory, name)
    path = directory / name
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise
    except OSError as error:  # a name that no file system accepts, or a circle of links
        raise ValueError(
            f"{name[:80]!r}: not a file that can be opened: {error.strerror}"
        ) from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{name}: is not a regular file")
    if path.is_symlink():
        real, home = path.resolve(), directory.resolve()
        allowed = (
            [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
        )
        if real.parent not in allowed:
            raise ValueError(
                f"{name}: is a link to {real}, outside of {directory}; put the file itself there"
            )
    return path


def file_below(directory: Place, name: str) -> Place:
    """`directory / name`, a regular file in that directory or in a folder below it.

    Example: file_below(directory, "encoding/encoding_dsv4.py").

    Raises:
      FileNotFoundError, ValueError: see file_in.
    """
    folders = name.split("/")[:-1]
    if not folders or isinstance(directory, Remote):
        return file_in(directory, name) if not folders else directory / name
    path = directory / name
    real, home = path.resolve(), directory.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(one) for one in allowed):
        raise ValueError(f"{name}: is a link to {real}, outside of {directory}")
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{name}: is not a regular file")
    return path


def _object_in(directory: Remote, name: str) -> Remote:
    """`file_in` of a bucket, which has no links and no pipes."""
    path = directory / name
    if path.is_file():
        return path
    if path.exists():
        raise ValueError(f"{name}: is not a regular file")
    raise FileNotFoundError(f"{path}: no such object")


def read_json(path: Place) -> Any:
    """Parses a JSON file.

    Raises:
      ValueError: not JSON, a key that occurs twice in one object, or brackets nested without end.
    """
    if (size := storage.size(path)) > _LONGEST_JSON:
        raise ValueError(f"{path.name}: got {size} bytes; must be at most {_LONGEST_JSON}")
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def parse_json(text: bytes) -> Any:
    """Parses JSON text.

    Raises:
      ValueError: see read_json.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(
            "not JSON that can be read: brackets within brackets without end"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not JSON: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r} stands twice")
    return found
