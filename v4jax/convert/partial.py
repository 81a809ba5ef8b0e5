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

from v4jax.checkpoint.atomic import write_json


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
        try:
            earlier = json.loads((partial / "plan.json").read_text())
        except (OSError, ValueError):
            earlier = None
        if earlier != plan:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write_json(partial / "plan.json", plan)
        try:
            yield partial
        except ValueError:  # bad input, which the next try would meet again
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            partial.with_suffix(".lock").unlink(missing_ok=True)


def fingerprint(source: pathlib.Path) -> list:
    """Where a source is, and the size and time of each of its files."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    return [
        str(source.absolute()),
        [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    ]
