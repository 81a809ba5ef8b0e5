"""Commands run in processes of their own, with this checkout importable."""

import os
import pathlib
import subprocess
import sys
import textwrap

ROOT = pathlib.Path(__file__).parent.parent
MINUTE = 60


def environment() -> dict[str, str]:
    """That of a fresh process in which this checkout is importable."""
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def run(*command: str, timeout: float = 2 * MINUTE) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment()
    )


def launched(code: str, count: int = 2, output: str = "all") -> list[str]:
    options = ["--processes", str(count), "--devices", "4", "--output", output]
    return [sys.executable, "-m", "v4jax", "launch", *options, "--", *python(code)]
