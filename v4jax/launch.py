"""Runs a command as several local processes that form one JAX job on simulated CPU devices.

    v4jax launch --processes 2 --devices 4 -- v4jax train configs/demo.py

Every process gets the variables that `sharding.processes.start` reads. The first process to fail
ends the job: the others get SIGTERM, and SIGKILL if they do not end. Nothing heavy is imported
here.

Next file to read: sharding/processes.py.
"""

import collections
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

GRACE_SECONDS = 5
"""Seconds between asking a process to end, because another one failed, and killing it."""
SAVING_SECONDS = 120
"""The same if SIGTERM asks the job itself to end, since training saves a checkpoint first."""

_TICK_SECONDS = 0.02
_LAST_LINES = 30


def launch(command: Sequence[str], processes: int, devices: int, output: str = "all") -> int:
    """Runs `command` in several processes, and returns 0 or the code of the first that failed.

    A process killed by signal n counts as 128 + n. SIGINT and SIGTERM are passed on to all
    processes, which may save first.

    Args:
      processes: number of processes.
      devices: simulated CPU devices of each process.
      output: "all": every line of every process, after "[i] ". "first": process 0 alone, unchanged,
        and the last lines of a process that fails.

    Raises:
      ValueError: no such command, or a count below 1.
    """
    for name, count in (("processes", processes), ("devices", devices)):
        if count < 1:
            raise ValueError(f"--{name}: got {count}; must be at least 1")
    if not command:
        raise ValueError(
            "launch needs a command after --: v4jax launch --processes 2 --devices 4 -- COMMAND"
        )
    if shutil.which(command[0]) is None:
        raise ValueError(f"launch: no such command {command[0]!r}")
    coordinator = f"127.0.0.1:{_free_port()}"
    jobs: list[_Process] = []
    forwarded = _forward_signals(jobs)
    try:
        for i in range(processes):
            jobs.append(
                _Process(command, _environment(coordinator, processes, i, devices), i, output)
            )
        forwarded.all_started = True
        if forwarded.number is not None and not forwarded.sent:
            forwarded.pass_on(jobs, forwarded.number)
        return _wait(jobs, forwarded)
    finally:
        for job in jobs:
            job.send(signal.SIGKILL)
        for job in jobs:
            job.finish()
        for number, handler in forwarded.old.items():
            signal.signal(number, handler)


class _Process:
    """One process of the job, in its own session, with the threads that pass its lines on."""

    def __init__(
        self, command: Sequence[str], environment: dict[str, str], index: int, output: str
    ):
        self.index = index
        self._popen = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._prefix = f"[{index}] " if output == "all" else ""
        self._shown = output == "all" or index == 0
        self._hidden: collections.deque[str] = collections.deque(maxlen=_LAST_LINES)
        streams = (self._popen.stdout, sys.stdout), (self._popen.stderr, sys.stderr)
        self._threads = [
            threading.Thread(target=self._pass_on, args=pair, daemon=True) for pair in streams
        ]
        for thread in self._threads:
            thread.start()
        if output == "all":
            print(f"[{index}] is process {self._popen.pid}", file=sys.stderr, flush=True)

    def _pass_on(self, source, target) -> None:
        for line in source:
            if self._shown:
                # Whole lines, so that those of two processes do not mix.
                target.write(self._prefix + line)
                target.flush()
            else:
                self._hidden.append(line)

    @property
    def code(self) -> int | None:
        """The exit code: None while it runs, 128 + n after signal n."""
        code = self._popen.poll()
        return code if code is None or code >= 0 else 128 - code

    def send(self, number: int) -> None:
        """Sends a signal to the process and its children, if it still runs."""
        if self._popen.poll() is None:
            os.killpg(self._popen.pid, number)

    def show_hidden(self) -> None:
        """Shows the last lines of a process whose output is hidden."""
        self.finish()
        for line in self._hidden:
            sys.stderr.write(f"[{self.index}] {line}")

    def finish(self) -> None:
        """Waits until it has ended and its last lines are read.

        A child that outlives it may keep the pipe open, so the wait for lines is short.
        """
        self._popen.wait()
        for thread, stream in zip(
            self._threads, (self._popen.stdout, self._popen.stderr), strict=True
        ):
            thread.join(timeout=2)
            if stream is not None and not thread.is_alive():
                stream.close()


class _Forwarded:
    """Notes of the signal handlers: the last signal, when the first came, the old handlers.

    A signal that comes while processes start is passed on once all have: one that is just being
    made is not among the jobs yet, and would never hear of it.
    """

    number: int | None = None
    when: float = 0.0
    all_started = False
    sent = False

    def __init__(self):
        self.old: dict[int, Any] = {}

    def pass_on(self, jobs: list[_Process], number: int) -> None:
        """Sends a signal to all processes that still run."""
        self.sent = True
        for job in jobs:
            job.send(number)


def _forward_signals(jobs: list[_Process]) -> _Forwarded:
    forwarded = _Forwarded()

    def handle(number, _):
        forwarded.number, forwarded.when = number, forwarded.when or time.monotonic()
        if forwarded.all_started:
            forwarded.pass_on(jobs, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        forwarded.old[number] = signal.signal(number, handle)
    return forwarded


def _wait(jobs: list[_Process], forwarded: _Forwarded) -> int:
    """Waits until all processes have ended; returns the exit code of the job."""
    failed, asked = None, 0.0
    while any(job.code is None for job in jobs):
        bad = [job for job in jobs if job.code]
        if bad and failed is None:
            # If two failed at once, report the one that says why, not one that was killed.
            failed = min(bad, key=lambda job: ((job.code or 0) > 128, job.index))
            asked = time.monotonic()
            # Otherwise all have been asked already, and a second signal would interrupt what they
            # do about the first.
            if forwarded.number is None:
                for job in jobs:
                    job.send(signal.SIGTERM)
        grace = SAVING_SECONDS if forwarded.number == signal.SIGTERM else GRACE_SECONDS
        ends = [
            start + seconds
            for start, seconds in ((asked, GRACE_SECONDS), (forwarded.when, grace))
            if start
        ]
        if ends and time.monotonic() > min(ends):
            for job in jobs:
                job.send(signal.SIGKILL)
        time.sleep(_TICK_SECONDS)
    failed = failed or next((job for job in jobs if job.code), None)
    if failed is None:  # also if a training run was asked to end
        return 0
    failed.show_hidden()
    print(
        f"v4jax launch: process {failed.index} ended with exit code {failed.code}",
        file=sys.stderr,
        flush=True,
    )
    return failed.code or 1


def _environment(coordinator: str, processes: int, index: int, devices: int) -> dict[str, str]:
    """The caller's variables for one process: without those of another job, with its own place."""
    environment = {name: value for name, value in os.environ.items() if name != "V4JAX_CLUSTER"}
    flags = re.sub(
        r"--xla_force_host_platform_device_count=\S*", "", environment.pop("XLA_FLAGS", "")
    )
    return environment | {
        "V4JAX_COORDINATOR": coordinator,
        "V4JAX_PROCESSES": str(processes),
        "V4JAX_PROCESS": str(index),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "XLA_FLAGS": flags.strip(),
        "PYTHONUNBUFFERED": "1",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
