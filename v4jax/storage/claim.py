"""Who writes to a run's folder in a bucket, where no lock can be held: the process that began last.

A process that begins notes itself in RUN/writer.json in place of the one before, which is dead, as
a rule, and cannot say so. If it lives, it finds the other's note before its next save, and ends.
Where nobody can be alive, it notes itself before its long work, the tokenising; else after all
checks, so that a job that is refused takes no run from a living one.

Next file to read: v4jax/storage/spool.py.
"""

import contextlib
import datetime
import json
import logging
import os
import pathlib
import socket
import uuid
from collections.abc import Iterator
from typing import Any

from v4jax.storage.files import read, remove, write
from v4jax.storage.places import Place
from v4jax.storage.remote import Remote

WRITER = "writer.json"
"""The note: a token, and the machine and process that it is of."""


class Claim:
    """The right of this process to write to a run's folder. On a disk every process has it."""

    def __init__(self, run: Place):
        """Takes the run's folder; asks and writes nothing."""
        self._path = run / WRITER if isinstance(run, Remote) else None
        self._own = {"token": uuid.uuid4().hex, **_this_process()}
        self._is_taken = False

    def require_free(self) -> None:
        """Refuses a run to which a process of this machine writes, before any work.

        Raises:
          ValueError: names the process.
        """
        noted = self._noted()
        if noted and _lives(noted):
            raise ValueError(
                f"run_dir: {self._path}: process {noted['pid']} of this machine writes to that run "
                f"since {noted['since']}; end it first, or choose another run directory"
            )

    @contextlib.contextmanager
    def announced(self) -> Iterator[None]:
        """Notes this process early, if no other can be alive; a fault before `take` undoes it.

        Raises:
          OSError: the store does not answer, or does not permit it.
        """
        early = self._path is not None and not _may_live(self._noted())
        if early:
            self._write()
        try:
            yield
        except BaseException:
            if early and not self._is_taken:
                with contextlib.suppress(OSError):
                    self._take_back()
            raise

    def take(self) -> None:
        """Makes this process the one that writes.

        Raises:
          ValueError: see `require_free`; another process of this machine began in the meantime.
        """
        self.require_free()
        self._write()
        self._is_taken = True

    def _write(self) -> None:
        if self._path is not None:
            write(self._path, json.dumps(self._own).encode() + b"\n")

    def _take_back(self) -> None:
        if self._path is not None and (self._noted() or {}).get("token") == self._own["token"]:
            remove(self._path)

    def holds(self) -> bool:
        """Whether no other process has taken the run over. A store that does not answer is logged.

        Before `take`, False.
        """
        if self._path is None:
            return True
        if not self._is_taken:
            return False
        try:
            return (self._noted() or {}).get("token") == self._own["token"]
        except OSError as error:
            logging.getLogger("v4jax").warning("whether another run writes is unknown: %s", error)
            return True

    def check(self) -> None:
        """Refuses to go on writing.

        Raises:
          ValueError: another process has taken the run over; names it.
        """
        if self.holds():
            return
        noted = self._noted()
        who = "somebody removed the note"
        if noted:
            who = "process {pid} of {host} has written there since {since}".format(**noted)
        raise ValueError(f"run_dir: {self._path}: is not this run's any more: {who}; this run ends")

    def _noted(self) -> dict[str, Any] | None:
        """What the note says; None without a note, or one that holds something else."""
        if self._path is None:
            return None
        try:
            noted = json.loads(read(self._path))
        except (FileNotFoundError, ValueError):
            return None
        known = isinstance(noted, dict) and self._own.keys() <= noted.keys()
        return noted if known else None


def _this_process() -> dict[str, Any]:
    """What tells this process from all others: machine, number, and when it started."""
    return {
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _lives(noted: dict[str, Any]) -> bool:
    """Whether a note is of another process of this machine that has not ended."""
    if noted["pid"] == os.getpid() or not _is_of_this_machine(noted):
        return False
    return noted["started"] != "" and noted["started"] == _started(noted["pid"])


def _may_live(noted: dict[str, Any] | None) -> bool:
    """Whether the process of a note may live: it does, or it is of another machine."""
    return noted is not None and (not _is_of_this_machine(noted) or _lives(noted))


def _is_of_this_machine(noted: dict[str, Any]) -> bool:
    """Whether it ran here since the machine started."""
    own = _this_process()
    return (noted["host"], noted["boot"]) == (own["host"], own["boot"])


def _started(pid: Any) -> str:
    """When a process started, in ticks of the machine's clock; "" if it has ended."""
    text = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    ended = not text or text[0] in "ZX"
    return "" if ended else text[19]


def _text(path: str) -> str:
    """The text of a file of /proc; "" where there is none."""
    try:
        return pathlib.Path(path).read_text().strip()
    except OSError:
        return ""
