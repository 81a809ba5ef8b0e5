"""Files that grow, for a run in a bucket, where nothing can grow: written here, sent there whole.

Next file to read: v4jax/storage/hub.py.
"""

import contextlib
import logging
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any

from v4jax.storage.files import copy
from v4jax.storage.places import Place
from v4jax.storage.remote import Remote

SECONDS = 30.0
"""Time between two sends."""


class Spool:
    """The folder on this machine that stands for a run's folder, in one `with` block.

    Of a run in a bucket a thread copies what has changed there, every SECONDS and when `send_soon`
    asks for it, and so does the end of the block. A failure is logged, and the next send tries
    again: metrics must not end a run. Of a run on a disk it is the folder itself.

    Attributes:
      folder: where to write.
    """

    def __init__(
        self,
        run: Place,
        fetched: Sequence[str],
        sends: bool,
        may_send: Callable[[], bool] = lambda: True,
    ):
        """Begins with copies of what is there.

        Args:
          run: the run's folder.
          fetched: names of files that go on growing.
          sends: whether this process sends; otherwise what it writes is dropped.
          may_send: asked before each send (claim.Claim.holds).
        """
        self._target = run if isinstance(run, Remote) else None
        self._sends, self._may_send = sends, may_send
        self._lock, self._wake, self._ended = threading.Lock(), threading.Event(), False
        self._asked: list[threading.Event] = []
        self._sent: dict[str, tuple[int, int]] = {}
        self._thread = threading.Thread(target=self._keep_sending, name="v4jax-spool", daemon=True)
        if not isinstance(run, Remote):
            self.folder = run
            return
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="v4jax-run-"))
        for name in fetched:
            with contextlib.suppress(FileNotFoundError):
                copy(run / name, self.folder / name)
                self._sent[str(self.folder / name)] = _mark(self.folder / name)

    def __enter__(self) -> "Spool":
        if self._target is not None and self._sends:
            self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        if self._target is None:
            return
        self._ended = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        self._send_all()
        shutil.rmtree(self.folder, ignore_errors=True)

    def send_soon(self) -> Callable[[], Any]:
        """Asks the thread to copy what has changed now; returns a function that waits for it."""
        done = threading.Event()
        if not self._thread.is_alive():
            return lambda: None
        with self._lock:
            self._asked.append(done)
        self._wake.set()
        return done.wait

    def _keep_sending(self) -> None:
        while not self._ended:
            self._wake.wait(SECONDS)
            self._wake.clear()
            with self._lock:
                asked, self._asked = self._asked, []
            try:
                self._send_all()
            finally:
                for one in asked:
                    one.set()

    def _send_all(self) -> None:
        if self._target is None or not self._sends or not self._may_send():
            return
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and not path.name.endswith(".tmp"):
                self._send(path, self._target / path.relative_to(self.folder).as_posix())

    def _send(self, path: pathlib.Path, target: Remote) -> None:
        try:
            mark = _mark(path)
            if self._sent.get(str(path)) != mark:
                copy(path, target)
                self._sent[str(path)] = mark
        except Exception as error:
            logging.getLogger("v4jax").warning("%s is not sent: %s", path.name, error)


def _mark(path: pathlib.Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns
