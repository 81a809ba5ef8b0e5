"""A file or folder of a bucket or of the Hub: pathlib's words for its name, fsspec for its bytes.

A folder is there while an object is in it. Nothing is cached: what others write or remove is seen.

Next file to read: v4jax/storage/streams.py.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any

from v4jax.storage.faults import retried

REQUEST_SECONDS = 60
"""A request that takes longer counts as failed. Ranges are read in pieces that fit."""
_TAGS = ("crc32c", "ETag", "etag", "blob_id")
"""What changes with an object's bytes, of gs, s3 and the Hub."""


@dataclasses.dataclass(frozen=True, order=True)
class Remote:
    """A place that is no path on this machine, such as gs://bucket/folder/file.

    Attributes:
      scheme: "gs", "s3" or "hf".
      key: "bucket/folder/file"; of the Hub "org/name@revision/file".
    """

    scheme: str
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    def __truediv__(self, name: Any) -> "Remote":
        return Remote(self.scheme, f"{self.key}/{name}")

    @property
    def name(self) -> str:
        """The last part of the name."""
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The end of the name from its last dot on: ".json"."""
        _, dot, end = self.name.rpartition(".")
        return dot + end if dot else ""

    @property
    def parent(self) -> "Remote":
        """The folder; that of a bucket is the bucket."""
        return Remote(self.scheme, self.key.rpartition("/")[0] or self.key)

    @property
    def bucket(self) -> str:
        """The bucket; of the Hub "org"."""
        return self.key.partition("/")[0]

    def with_name(self, name: str) -> "Remote":
        """The place called `name` in the same folder."""
        return self.parent / name

    def exists(self) -> bool:
        """Whether there is a file or a folder."""
        return info(self) is not None

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        found = info(self)
        return found is not None and found["type"] == "file"

    def is_dir(self) -> bool:
        """Whether objects lie below this name."""
        found = info(self)
        return found is not None and found["type"] == "directory"

    def iterdir(self) -> Iterator["Remote"]:
        """The files and folders in this folder; none where nothing is."""
        fs = file_system(self.scheme)
        try:
            found = retried(self, fs.ls, self.key, detail=False)
        except FileNotFoundError:
            require_bucket(self)
            return
        for key in sorted(found):
            if key.rstrip("/") != self.key:
                yield Remote(self.scheme, key.rstrip("/"))

    def read_bytes(self) -> bytes:
        """The whole contents."""
        return in_bucket(self, file_system(self.scheme).cat_file, self.key)

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole contents as text."""
        return self.read_bytes().decode(encoding)


@functools.cache
def file_system(scheme: str) -> Any:
    """fsspec's client of a scheme. It caches no listing, which would never show others' work."""
    if scheme == "gs":
        import gcsfs  # pyright: ignore[reportMissingImports]

        for name in ("gcsfs", "google.auth"):  # they print faults that end as one line here
            logging.getLogger(name).setLevel(logging.CRITICAL)
        return gcsfs.GCSFileSystem(
            use_listings_cache=False, requests_timeout=REQUEST_SECONDS, skip_instance_cache=True
        )
    if scheme == "s3":
        import s3fs  # pyright: ignore[reportMissingImports]

        return s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    import huggingface_hub

    return huggingface_hub.HfFileSystem(skip_instance_cache=True)  # at a commit, nothing changes


def info(place: Remote) -> dict[str, Any] | None:
    """What the store says about a file or folder; None if there is none."""
    try:
        return retried(place, file_system(place.scheme).info, place.key)
    except FileNotFoundError:
        require_bucket(place)
        return None


def tree(folder: Remote) -> dict[str, tuple[int, str]]:
    """Name below `folder` -> (bytes, tag), of all files; one request for each 1,000."""
    fs = file_system(folder.scheme)
    try:
        found = retried(folder, fs.find, folder.key, detail=True)
    except FileNotFoundError:
        found = {}
    if not found:
        require_bucket(folder)
    head = f"{folder.key}/"
    return {
        key.removeprefix(head): (one["size"], tag_of(one))
        for key, one in sorted(found.items())
        if key.startswith(head) and not key.endswith("/") and one["type"] == "file"
    }


def tag_of(found: dict[str, Any]) -> str:
    """What changes with an object's bytes: crc32c of gs, ETag of s3, hash of the Hub."""
    lfs = found.get("lfs")
    if lfs:
        return lfs["sha256"]
    return next((str(found[name]).strip('"') for name in _TAGS if found.get(name)), "")


def read_range(place: Remote, start: int, end: int) -> bytes:
    """The bytes from `start` up to `end`, less where the file ends before.

    Raises:
      OSError: see faults.py; or the answer is cut short time and again.
    """
    return in_bucket(place, _range, place, start, end)


def _range(place: Remote, start: int, end: int) -> bytes:
    if place.scheme == "hf":
        return _hub_range(place, start, end)
    return file_system(place.scheme).cat_file(place.key, start=start, end=end)


def _hub_range(place: Remote, start: int, end: int) -> bytes:
    """A range of a file of the Hub by one request; HfFileSystem makes several, and reads 5 MB."""
    import huggingface_hub
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    name, _, file = place.key.partition("@")
    commit, _, file = file.partition("/")
    url = huggingface_hub.hf_hub_url(name, file, revision=commit)
    headers = {**build_hf_headers(), "range": f"bytes={start}-{end - 1}"}
    answer = get_session().get(url, headers=headers, timeout=REQUEST_SECONDS, follow_redirects=True)
    hf_raise_for_status(answer)
    return answer.content


def require_bucket(place: Remote) -> None:
    """Refuses a bucket that does not exist; called where nothing was found.

    Raises:
      ValueError: there is no such bucket.
      PermissionError: the bucket may not be listed.
    """
    try:
        if place.scheme != "hf":
            _list_one(place.scheme, place.bucket)
    except FileNotFoundError:
        raise ValueError(f"{place}: there is no bucket {place.bucket!r}") from None


@functools.cache
def _list_one(scheme: str, bucket: str) -> None:
    """Asks a bucket for one name; only success is remembered."""
    fs, place = file_system(scheme), Remote(scheme, bucket)
    if scheme == "gs":
        retried(place, fs.call, "GET", "b/{}/o", bucket, maxResults=1, json_out=True)
    else:
        retried(place, fs.call_s3, "list_objects_v2", Bucket=bucket, MaxKeys=1)


def in_bucket(place: Remote, function, *arguments) -> Any:
    """`function`'s result with further tries; of a missing file says if the bucket is missing."""
    try:
        return retried(place, function, *arguments)
    except FileNotFoundError:
        require_bucket(place)
        raise
