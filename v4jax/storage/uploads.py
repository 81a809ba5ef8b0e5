"""New objects of a bucket, written from start to end: they appear at `commit`, or never.

A process that is killed leaves nothing visible. On S3 the parts that it sent stay, and cost, until
a lifecycle rule removes them (AbortIncompleteMultipartUpload); on GCS they go after a week.

Next file to read: v4jax/storage/files.py.
"""

import concurrent.futures
import functools
import logging
from typing import Any

from v4jax.storage.faults import in_one_line, retried
from v4jax.storage.remote import Remote, file_system, in_bucket, info, require_bucket

PART_BYTES = 32 * 2**20
"""Bytes of a part of an upload. S3 takes 10,000 parts, which is 335 GB."""
_SENDING = 4
"""Parts of an object that are on their way at once, on S3."""


class Upload:
    """What the uploads to all stores have in common; begin_upload makes one."""

    def __init__(self, place: Remote):
        self._place, self._size = place, 0
        self._fs = file_system(place.scheme)
        self._before = info(place)

    def write(self, data: Any) -> int:
        """Appends `data`: bytes, or anything with a buffer of bytes.

        Raises:
          OSError: the store refuses it, now or in an earlier part.
        """
        data = memoryview(data).cast("B")
        for start in range(0, len(data), PART_BYTES):
            self._append(data[start : start + PART_BYTES])
        self._size += len(data)
        return len(data)

    def commit(self) -> None:
        """Makes the object visible.

        Raises:
          OSError: the store refuses, and has no new object of this size (the answer to a commit
            that succeeded may have been lost); or it put the parts of one together wrongly.
        """
        try:
            self._commit()
        except OSError:
            require_bucket(self._place)
            if not self._is_there():
                raise
        if self._in_parts() and not self._is_whole(info(self._place)):
            in_bucket(self._place, self._fs.rm_file, self._place.key)
            raise OSError(f"{self._place}: had not the {self._size} bytes that were sent; removed")

    def discard(self) -> None:
        """Drops what was written. A fault here is only logged: it follows another."""
        try:
            self._discard()
        except Exception as error:
            logging.getLogger("v4jax").debug("%s: upload not discarded: %s", self._place, error)

    def _is_there(self) -> bool:
        """Whether the store has a new object, of this size."""
        found = info(self._place)
        return found != self._before and self._is_whole(found)

    def _is_whole(self, found: dict[str, Any] | None) -> bool:
        """Whether an object has all bytes; S3 gives equal ones of one second the same tags."""
        return found is not None and found["size"] == self._size

    def _in_parts(self) -> bool:
        """Whether the object took more than one request."""
        raise NotImplementedError

    def _append(self, data: memoryview) -> None:
        raise NotImplementedError

    def _commit(self) -> None:
        raise NotImplementedError

    def _discard(self) -> None:
        raise NotImplementedError


class _GcsUpload(Upload):
    """One request for what fits a part, else a resumable upload by gcsfs.

    gcsfs sends a part again whose answer was lost. GCS ignores bytes that it has.
    """

    def __init__(self, place: Remote):
        super().__init__(place)
        self._rest = bytearray()
        self._file: Any = None

    def _in_parts(self) -> bool:
        return self._file is not None

    def _append(self, data: memoryview) -> None:
        self._rest += data
        if self._file is None and len(self._rest) <= PART_BYTES:
            return
        with in_one_line(self._place):
            if self._file is None:
                self._file = self._fs.open(
                    self._place.key, "wb", autocommit=False, block_size=PART_BYTES
                )
            self._file.write(bytes(self._rest))
        self._rest.clear()

    def _commit(self) -> None:
        if self._file is None:
            in_bucket(self._place, self._fs.pipe_file, self._place.key, bytes(self._rest))
            return
        with in_one_line(self._place):
            self._file.close()
            self._file.commit()

    def _discard(self) -> None:
        if self._file is None:
            return
        try:
            self._file.discard()
        finally:
            self._file.closed = True  # otherwise its finalizer sends the rest


class _S3Upload(Upload):
    """A multipart upload. s3fs's own gives up at the first 503 of a part."""

    def __init__(self, place: Remote):
        super().__init__(place)
        self._rest, self._parts, self._id = bytearray(), 0, ""
        self._sending: list[concurrent.futures.Future] = []
        self._sent: list[dict[str, Any]] = []

    def _in_parts(self) -> bool:
        return bool(self._id)

    def _append(self, data: memoryview) -> None:
        self._rest += data
        while len(self._rest) >= PART_BYTES:
            self._send(bytes(self._rest[:PART_BYTES]))
            del self._rest[:PART_BYTES]

    def _send(self, data: bytes) -> None:
        if not self._id:
            self._id = self._call("create_multipart_upload")["UploadId"]
        if len(self._sending) == _SENDING:
            self._sent.append(self._sending.pop(0).result())
        self._parts += 1
        self._sending.append(_senders().submit(self._part, self._parts, data))

    def _part(self, number: int, data: bytes) -> dict[str, Any]:
        answer = self._call("upload_part", UploadId=self._id, PartNumber=number, Body=data)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def _commit(self) -> None:
        if not self._id:
            in_bucket(self._place, self._fs.pipe_file, self._place.key, bytes(self._rest))
            return
        if self._rest:
            self._send(bytes(self._rest))
        self._sent += [one.result() for one in self._sending]
        self._sending = []
        parts = {"Parts": self._sent}
        self._call("complete_multipart_upload", UploadId=self._id, MultipartUpload=parts)

    def _discard(self) -> None:
        concurrent.futures.wait(self._sending)
        if self._id:
            self._call("abort_multipart_upload", UploadId=self._id)

    def _call(self, method: str, **options) -> Any:
        key = self._place.key.partition("/")[2]
        function = functools.partial(self._fs.call_s3, method, **options)
        return retried(self._place, function, Bucket=self._place.bucket, Key=key)


def begin_upload(place: Remote) -> Upload:
    """An upload of a new object.

    Raises:
      ValueError: a store that is only read.
      OSError: no permission, or the store is out of reach.
    """
    if place.scheme == "s3":
        return _S3Upload(place)
    if place.scheme == "gs":
        return _GcsUpload(place)
    raise ValueError(f"{place}: {place.scheme}:// is only read from")


@functools.cache
def _senders() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(2 * _SENDING, "v4jax-parts")
