"""Lets Orbax and TensorStore read and write gs:// and s3:// as this program's other files are.

Orbax knows gs://. For s3:// three of its functions are replaced, which take any other address for a
path; a version of Orbax without them is refused. Both write through TensorStore's own drivers, and
small files through etils.epath, whose client would cache listings without end.

Next file to read: v4jax/checkpoint/store.py.
"""

import functools
import importlib
import importlib.metadata
import logging
import os
from typing import Any

from v4jax.storage import Place, Remote, remove, require_writable

_NEVER_THERE = "no-object-has-this-name"
DATA_FILE_BYTES = 400 * 2**20
"""Bytes of a file of an OCDBT database. TensorStore sends each to S3 in one request."""
_REPLACED = (
    ("orbax.checkpoint._src.path.gcs_utils", "get_kvstore_for_gcs"),
    ("orbax.checkpoint._src.serialization.tensorstore_utils", "_use_gcs_driver"),
    ("orbax.checkpoint._src.serialization.tensorstore_utils", "_normalize_path"),
)


def kvstore(path: Place) -> dict[str, Any] | str:
    """TensorStore's key-value store of a folder."""
    if not isinstance(path, Remote):
        return f"file://{path.absolute()}/"
    _, _, key = path.key.partition("/")
    spec = {"driver": "gcs", "bucket": path.bucket, "path": f"{key}/"}
    return spec if path.scheme == "gs" else spec | {"driver": "s3"} | _s3_endpoint()


def _s3_endpoint() -> dict[str, Any]:
    """Where S3 is, and whose credentials are meant, by the environment."""
    found: dict[str, Any] = {}
    if os.environ.get(
        "AWS_ACCESS_KEY_ID"
    ):  # else it looks for profiles, and logs that none is there
        found["aws_credentials"] = {"type": "environment"}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        found["endpoint"] = endpoint
        region = region or "us-east-1"
    if region:
        found["aws_region"] = region
    return found


def check_bucket(folder: Remote, what: str = "") -> None:
    """Refuses a bucket in which Orbax could not keep checkpoints, before any work.

    Raises:
      ValueError: it is only read from, or there is no such bucket.
      PermissionError: it may not be listed, nothing may be deleted in it, or on GCS it may not be
        described, which Orbax asks for.
    """
    require_writable(folder, what)
    prepare(folder.scheme)
    try:
        remove(folder / _NEVER_THERE)  # a store that forbids it says so for a missing object too
    except PermissionError as error:
        needs = "checkpoints need the permission to delete objects"
        raise PermissionError(f"{folder}: {needs} ({error})") from error
    if folder.scheme == "gs":
        from orbax.checkpoint._src.path import gcs_utils

        try:
            gcs_utils.get_bucket(folder.bucket)
        except Exception as error:  # of google-cloud-storage
            said = " ".join(str(error).split())
            needs = "checkpoints need the permission storage.buckets.get"
            raise PermissionError(f"gs://{folder.bucket}: {needs} ({said})") from error


@functools.cache
def prepare(scheme: str) -> None:
    """Sets the clients up for buckets of a scheme, once.

    Raises:
      ValueError: this version of Orbax cannot write to s3://.
    """
    import fsspec.config

    os.environ["EPATH_USE_TF"] = "false"  # TensorFlow, where it is installed, has other rules
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "30")  # else it waits on
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    for name in {"gs": ("gs", "gcs"), "s3": ("s3",)}[scheme]:
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    logging.getLogger("absl").addFilter(_without_traceback)
    if scheme == "s3":
        _teach_s3()


def _without_traceback(record: logging.LogRecord) -> bool:
    """Leaves the line of what Orbax logs; what it logs with a traceback it raises too."""
    record.exc_info = None
    return True


def _teach_s3() -> None:
    """Replaces the three functions of Orbax."""
    modules = [importlib.import_module(module) for module, _ in _REPLACED]
    try:
        old = [getattr(module, one[1]) for module, one in zip(modules, _REPLACED, strict=True)]
    except AttributeError:
        version = importlib.metadata.version("orbax-checkpoint")
        raise ValueError(f"s3://: orbax-checkpoint {version} cannot write there") from None
    of_gcs, uses_driver, normalized = old

    def get_kvstore_for_gcs(path: str) -> dict[str, Any]:
        if not path.startswith("s3://"):
            return of_gcs(path)
        bucket, _, key = path.removeprefix("s3://").partition("/")
        return {"driver": "s3", "bucket": bucket, "path": key} | _s3_endpoint()

    def _use_gcs_driver(directory: str) -> bool:
        return directory.startswith("s3://") or uses_driver(directory)

    def _normalize_path(path: str) -> str:
        found = normalized(path)
        return f"s3://{found.removeprefix('s3:/')}" if found.startswith("s3:/") else found

    new = (get_kvstore_for_gcs, _use_gcs_driver, _normalize_path)
    for module, function in zip(modules, new, strict=True):
        setattr(module, function.__name__, function)
