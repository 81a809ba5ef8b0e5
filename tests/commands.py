"""Runs commands in processes of their own, with this checkout importable."""

import os
import pathlib
import subprocess
import sys
import textwrap

import jax

ROOT = pathlib.Path(__file__).parent.parent
MINUTE = 60


def environment() -> dict[str, str]:
    """The environment of a fresh process that can import this checkout."""
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def programs_compiled_here() -> dict[str, str]:
    """The environment of a process that compiles what this one has compiled.

    It reads the programs and writes none: a killed process would leave half an entry.
    """
    return {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9",
    }


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def run(*command: str, timeout: float = 2 * MINUTE) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment()
    )


def launched(code: str, count: int = 2, output: str = "all") -> list[str]:
    options = ["--processes", str(count), "--devices", "4", "--output", output]
    return [sys.executable, "-m", "v4jax", "launch", *options, "--", *python(code)]
