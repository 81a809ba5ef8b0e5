"""Reads what a user gives as a place: a path, gs://bucket/..., s3://bucket/..., or a Hub name.

Next file to read: v4jax/storage/files.py.
"""

import importlib.util
import os
import pathlib
import re
from typing import TypeGuard

from v4jax.storage.local import local_path, prefix, shortened
from v4jax.storage.remote import Remote, require_bucket

Place = pathlib.Path | Remote
PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3"), "hf": ("huggingface_hub", "hub")}
"""Scheme -> the package that reads it, and the extra of v4jax that installs the package."""
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/(?:/(?!/))?(.*)", re.S)
"""One slash will do: pathlib makes gs:/bucket of gs://bucket."""
_HUB_KEY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def is_remote(path: object) -> TypeGuard[Remote]:
    """Whether a place is in a bucket or on the Hub, and no path on this machine."""
    return isinstance(path, Remote)


def place(given: str | os.PathLike | Remote, what: str = "") -> Place:
    """The place that `given` names: a path on this machine (local_path) or one in a bucket.

    Args:
      what: the flag or argument that gave it, for the error message.

    Raises:
      ValueError: see local_path; or an unknown scheme, no bucket, a name that no object should
        have, or the package that reads the bucket is missing.
    """
    if isinstance(given, Remote):
        return given
    text = os.fspath(given) if isinstance(given, (str, os.PathLike)) else ""
    address = _ADDRESS.fullmatch(text) if isinstance(text, str) else None
    if address is None:
        return local_path(given, what)
    head = f"{prefix(what)}got {shortened(text)}; "
    scheme, key = address[1].lower(), address[2].rstrip("/")
    if scheme not in PACKAGES:
        known = "gs://, s3:// or hf://"
        raise ValueError(f"{head}must be a path on this machine, or an address with {known}")
    if fault := _fault(scheme, key):
        raise ValueError(head + fault)
    return Remote(scheme, key)


def require_writable(found: Place, what: str = "") -> None:
    """Refuses a place that is only read, and a bucket that does not exist or may not be listed.

    Raises:
      ValueError: names the argument `what`.
      PermissionError: the bucket may not be listed.
    """
    if not isinstance(found, Remote):
        return
    if found.scheme == "hf":
        raise ValueError(f"{prefix(what)}got {str(found)!r}; the Hub is only read from")
    require_bucket(found)


def _fault(scheme: str, key: str) -> str:
    """Why `key` names nothing, or cannot be read here; "" if it can."""
    parts = key.split("/")
    if scheme == "hf" and not _HUB_KEY.fullmatch(key):
        return "must be hf://org/name or hf://org/name@revision"
    if not parts[0]:
        return f"must name a bucket, as {scheme}://bucket/folder"
    if any(part in ("", ".", "..") for part in parts):
        return "must have no empty part, . or .. in it"
    if any(mark in key for mark in "\0\n\r?#*[]"):
        return "must have none of the characters ? # * [ ] and no line breaks in it"
    package, extra = PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        return f"{scheme}:// needs the package {package}; pip install 'v4jax[{extra}]'"
    return ""
