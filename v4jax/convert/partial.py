"""The folder in which a conversion is made, which a later try of the same conversion goes on with.

Next file to read: v4jax/convert/progress.py.
"""

import contextlib
import fcntl
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from v4jax import storage
from v4jax.checkpoint.atomic import write_json
from v4jax.storage import Place, Remote

PLAN_FILE = "plan.json"
"""What an unfinished conversion is to become."""


@contextlib.contextmanager
def begun(partial: pathlib.Path, plan: dict[str, Any]) -> Iterator[pathlib.Path]:
    """The directory in which a conversion is made.

    What an earlier try of the same conversion left is kept; anything else is removed.
    """
    plan = json.loads(json.dumps(plan))
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{partial}: another conversion is writing there") from None
        if _plan_in(partial) != plan:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write_json(partial / PLAN_FILE, plan)
        try:
            yield partial
        except ValueError:  # bad input, which the next try would meet again
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            partial.with_suffix(".lock").unlink(missing_ok=True)


@contextlib.contextmanager
def begun_in_bucket(target: Remote, plan: dict[str, Any]) -> Iterator[Remote]:
    """The target itself, which is no checkpoint before its config.json is written, as the last.

    What an earlier try of the same conversion left is kept.

    Raises:
      ValueError: the folder holds something else.
    """
    plan = json.loads(json.dumps(plan))
    found = storage.listing(target)
    if found and _plan_in(target) != plan:
        raise ValueError(
            f"{target}: holds {next(iter(found))}, and no unfinished conversion of this source "
            "with these settings; choose another folder, or empty this one"
        )
    write_json(target / PLAN_FILE, plan)
    yield target
    storage.remove(target / PLAN_FILE)


def _plan_in(folder: Place) -> Any:
    """The plan of the conversion that was begun in a folder; None if none was."""
    try:
        return json.loads(storage.read(folder / PLAN_FILE))
    except (OSError, ValueError):
        return None


def fingerprint(source: Place) -> list:
    """Where a source is, and the size of each of its files, and its time or tag."""
    if isinstance(source, Remote):
        return [str(source), [[name, *one] for name, one in storage.listing(source).items()]]
    files = sorted(path for path in source.rglob("*") if path.is_file())
    return [
        str(source.absolute()),
        [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    ]
