"""Tries requests again while a store is busy, and makes one line of what its clients raise.

gcsfs, s3fs and huggingface_hub raise some thirty types for the same few faults. Here a fault is
FileNotFoundError, FileExistsError, PermissionError or OSError, and its text names the place.

Next file to read: v4jax/storage/remote.py.
"""

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before the second try, the third and so on; each is shortened or stretched at random, so
that processes that failed together do not come back together. The clients try again by themselves
before that."""
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_NO_PERMISSION = frozenset({401, 403})
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError)
_CLIENTS = ("aiohttp", "aiobotocore", "asyncio", "botocore", "fsspec", "httpcore", "httpx")
_CLIENTS += ("httpx2", "requests", "urllib3", "huggingface_hub", "gcsfs", "s3fs", "google")
_LONGEST = 300


def retried(place: Any, function: Callable, *arguments, **options) -> Any:
    """`function`'s result, after further tries where the store was busy or out of reach.

    Args:
      place: what the request is about, for the error.

    Raises:
      OSError: see in_one_line.
    """
    for wait in WAITS:
        try:
            return function(*arguments, **options)
        except Exception as error:
            if not is_transient(error):
                raise _translated(error, place) from error
        time.sleep(wait * random.uniform(0.5, 1.5))
    with in_one_line(place):
        return function(*arguments, **options)


@contextlib.contextmanager
def in_one_line(place: Any) -> Iterator[None]:
    """Gives a store's faults v4jax's types and words; other errors pass.

    Raises:
      FileNotFoundError, FileExistsError, PermissionError, OSError: in one line that names `place`.
    """
    try:
        yield
    except Exception as error:
        raise _translated(error, place) from error


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    status = status_of(error)
    if status is not None:
        return status in _BUSY
    if isinstance(error, _FINAL) or _has_name(error, _NO_CREDENTIALS):
        return False
    return isinstance(error, (OSError, TimeoutError)) or _is_of_client(error)


def _translated(error: Exception, place: Any) -> Exception:
    """A store's fault in the words and types of v4jax; any other error as it is."""
    if not _is_of_store(error):
        return error
    status = status_of(error)
    text = " ".join(str(error).split())[:_LONGEST] or type(error).__name__
    if _has_name(error, _NO_CREDENTIALS):
        return PermissionError(f"{place}: no credentials were found ({text})")
    if status in _NO_PERMISSION or isinstance(error, PermissionError):
        return PermissionError(f"{place}: no permission ({text})")
    if status == 404 or isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{place}: no such object")
    if status == 412 or isinstance(error, FileExistsError):
        return FileExistsError(f"{place}: exists already")
    return OSError(f"{place}: {text}")


def status_of(error: BaseException) -> int | None:
    """The HTTP status that a client's error stands for; None where the store gave no answer."""
    for one in _causes(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):  # botocore
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:  # huggingface_hub, requests; gcsfs; aiohttp
            found = getattr(response, "status_code", None)
            found = found or getattr(one, "code", None) or getattr(one, "status", None)
        if str(found).isdigit():
            return int(str(found))
        if type(one) is OSError and str(one).startswith("Forbidden: "):  # gcsfs
            return 403
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    one: BaseException | None = error
    while one is not None:
        yield one
        one = one.__cause__


def _has_name(error: BaseException, names: tuple[str, ...]) -> bool:
    return any(type(one).__name__ in names for one in _causes(error))


def _is_of_client(error: BaseException) -> bool:
    return any(type(one).__module__.split(".")[0] in _CLIENTS for one in _causes(error))


def _is_of_store(error: BaseException) -> bool:
    """Whether a store or the way to it is at fault, and not this program."""
    return isinstance(error, OSError) or status_of(error) is not None or _is_of_client(error)
