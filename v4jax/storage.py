"""The door to files: whatever a user gives as a path becomes a path on this machine here, or is refused in one line.

Nothing is read or written here. Imports nothing of v4jax, so that every file may use it.

Next file to read: v4jax/foreign.py.
"""

import os
import pathlib
import re

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
"""One slash is enough: pathlib makes gs:/bucket of gs://bucket."""
_LONGEST_NAME = 255
"""Bytes of a file's name, on every usual file system."""


def local_path(given, what: str = "") -> pathlib.Path:
    """The path that `given` (text, or a path object) names on this machine, with ~ and ~user expanded.

    Applying it to its result changes nothing: what would then be read as a bucket or a home directory ("./gs:/x", "./~x")
    comes back absolute.

    Args:
      what: the flag or argument that gave it, for the error.

    Raises:
      ValueError: nothing that can be a path here: a bucket or another scheme://, an empty text, a NUL, a name that no file
        system takes, the home of an unknown user.
    """
    text = os.fspath(given) if isinstance(given, (str, os.PathLike)) else None
    if fault := _fault(text):
        raise ValueError(f"{what and what + ': '}got {_short(given if text is None else text)}; {fault}")
    path = pathlib.Path(os.path.expanduser(text))
    return path.absolute() if _SCHEME.match(str(path)) or str(path).startswith("~") else path


def folder_to_fill(given, what: str) -> pathlib.Path:
    """`local_path` of a folder that is there, or can be made, and may be written to; nothing is made.

    Raises:
      ValueError: see local_path; or it, or what is to hold it, is a file or may not be written to.
    """
    path = local_path(given, what)
    there = next(one for one in (path, *path.absolute().parents) if os.path.lexists(one))
    if not there.is_dir():
        raise ValueError(f"{what}: got {path}; {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{what}: got {path}; {there} may not be written to")
    return path


def file_to_write(given, what: str = "") -> pathlib.Path:
    """`local_path` of a file that can be written, or written anew, in a folder that is there; nothing is written.

    Raises:
      ValueError: see local_path; or its folder is missing or may not be written to, or a folder has its place.
    """
    path = local_path(given, what)
    head, folder = f"{what and what + ': '}got {path}", path.parent
    if not folder.is_dir():
        raise ValueError(f"{head}; its folder {folder} does not exist")
    if path.is_dir():
        raise ValueError(f"{head}; must be a file, and is a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{head}; its folder {folder} may not be written to")
    return path


def _fault(text) -> str:
    """Why `text` is no path on this machine; "" if it is one."""
    if not isinstance(text, str):
        return "must be a path"
    if not text:
        return "must not be empty"
    if _SCHEME.match(text):
        return "must be a path on this machine; buckets (gs://, s3://) and other addresses are not supported yet"
    try:
        names = os.fsencode(text).split(os.sep.encode())
    except UnicodeEncodeError:
        return "must be text that a file's name can hold"
    if b"\0" in os.fsencode(text):
        return "must not hold a NUL character"
    if max(map(len, names)) > _LONGEST_NAME:
        return f"has a name of {max(map(len, names))} bytes; a file system takes at most {_LONGEST_NAME}"
    if os.path.expanduser(text).startswith("~"):
        return f"there is no user {text.split(os.sep)[0][1:]!r} with a home directory (./~ begins a name with ~)"
    return ""


def _short(given) -> str:
    text = repr(given)
    return text if len(text) <= 200 else f"{text[:197]}..."
