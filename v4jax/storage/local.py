"""Turns what a user gives as a path into a path on this machine, or refuses it.

Nothing is read or written here.

Next file to read: v4jax/storage/faults.py.
"""

import os
import pathlib
import re
from typing import Any

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
"""One slash is enough: pathlib turns gs://bucket into gs:/bucket."""
_LONGEST_NAME = 255
"""Bytes of a file name on all common file systems."""
_TAKEN_FOR_SCHEMES = ("gs:", "s3:")
_TAKEN_FOR_BUCKETS = ("gs", "s3", "az", "hf")
_ELSEWHERE = "must be a path on this machine; buckets (gs://, s3://, ...) are not supported here"


def local_path(given: Any, what: str = "") -> pathlib.Path:
    """The path that `given` names on this machine, with ~ and ~user expanded.

    Applying it to its own result changes nothing: a path that would then look like a bucket or a
    home directory ("./gs:/x", "./~x") is returned absolute.

    Args:
      what: the flag or argument that gave the path, for the error message.

    Raises:
      ValueError: a bucket or another scheme://, an empty text, a NUL, a name that is too long or
        that no file can have, the home of an unknown user, or something that is no path at all.
    """
    text = os.fspath(given) if isinstance(given, (str, os.PathLike)) else None
    fault = _fault(text)
    if text is None or fault:
        got = shortened(given if text is None else text)
        raise ValueError(f"{prefix(what)}got {got}; {fault}")
    path = pathlib.Path(os.path.expanduser(text))
    return path.absolute() if _SCHEME.match(str(path)) or str(path).startswith("~") else path


def folder_to_fill(given: str | os.PathLike, what: str = "") -> pathlib.Path:
    """`local_path` of a folder that exists or can be made, and can be written to. Makes nothing.

    Raises:
      ValueError: see local_path; or the folder, or one above it, is a file or is read-only.
    """
    path = local_path(given, what)
    head = f"{prefix(what)}got {path}"
    there = next(one for one in (path, *path.absolute().parents) if os.path.lexists(one))
    head += ", which" if there == path else f"; {there}"
    if not there.is_dir():
        raise ValueError(f"{head} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{head} may not be written to")
    return path


def path_of_checkpoints(given: str | os.PathLike, what: str = "") -> pathlib.Path:
    """`local_path` of a folder that Orbax reads or writes, absolute.

    Orbax makes gs:// of gs:/ wherever it stands in a path, and etils an address of /gs/bucket.

    Raises:
      ValueError: see local_path; or Orbax would take the path for a bucket's.
    """
    path = local_path(given, what).absolute()
    taken = [part for part in path.parts if part.endswith(_TAKEN_FOR_SCHEMES)]
    taken += [f"/{part}" for part in path.parts[1:2] if part in _TAKEN_FOR_BUCKETS]
    if taken:
        raise ValueError(
            f"{prefix(what)}got {path}; Orbax, which writes checkpoints, takes {taken[0]!r} in it "
            "for the address of a bucket; give another folder"
        )
    return path


def file_to_write(given: str | os.PathLike, what: str = "") -> pathlib.Path:
    """`local_path` of a file that can be written in a folder that exists. Writes nothing.

    Raises:
      ValueError: see local_path; or the folder is missing or read-only, or the path is a folder.
    """
    path = local_path(given, what)
    head = f"{prefix(what)}got {path}"
    if not path.parent.is_dir():
        raise ValueError(f"{head}; its folder {path.parent} does not exist")
    if path.is_dir():
        raise ValueError(f"{head}; must be a file, and is a folder")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{head}; its folder {path.parent} may not be written to")
    return path


def _fault(text: Any) -> str:
    """Why `text` is no path on this machine; "" if it is one."""
    if not isinstance(text, str):
        return "must be a path"
    if not text:
        return "must not be empty"
    if _SCHEME.match(text):
        return _ELSEWHERE
    try:
        names = os.fsencode(text).split(os.sep.encode())
    except UnicodeEncodeError:
        return "must be text that a file name can hold"
    if "\0" in text:
        return "must not hold a NUL character"
    longest = max(map(len, names))
    if longest > _LONGEST_NAME:
        return f"has a name of {longest} bytes; a file system takes at most {_LONGEST_NAME}"
    if os.path.expanduser(text).startswith("~"):
        user = text.split(os.sep)[0][1:]
        return f"there is no user {user!r} with a home directory (a file called so: ./{text})"
    return ""


def prefix(what: str) -> str:
    """How an error about the argument `what` begins."""
    return f"{what}: " if what else ""


def shortened(given: Any) -> str:
    """`given` in quotes, as an error shows it."""
    text = repr(given)
    return text if len(text) <= 200 else f"{text[:197]}..."
