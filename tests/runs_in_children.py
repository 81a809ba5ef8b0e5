"""Runs in child processes that can be killed: forked from one that has imported all, in a second.

A child has its own clients of the stores and writes its end to a file.
"""

import contextlib
import multiprocessing
import os
import pathlib
import traceback

import gcsfs  # noqa: F401  (what a run in a bucket imports, once for all children)
import jax
import matplotlib.figure  # noqa: F401
import s3fs
import stores
import tensorboardX  # noqa: F401
from commands import ROOT
from google.cloud import storage as google_storage  # noqa: F401
from small_runs import small_run

from v4jax.storage import spool, uploads
from v4jax.train.loop import train

_CHILDREN = multiprocessing.get_context("forkserver")
_CHILDREN.set_forkserver_preload([__name__])


def start(text, run, urls, ends: pathlib.Path, **changes):
    """A child that trains `small_run(text, run, **changes)`.

    Args:
      urls: scheme -> address of the store.
      ends: the file that gets "done", or the error in words.
    """
    cache = jax.config.jax_compilation_cache_dir
    with contextlib.suppress(FileNotFoundError):
        ends.unlink()
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"  # of the process that forks
    try:
        arguments = str(text), str(run), urls, ends, cache, changes
        child = _CHILDREN.Process(target=_train, args=arguments)
        child.start()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return child


def _train(text, run, urls, ends, cache, changes) -> None:
    output = os.open(ends.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(stores.environment(urls["s3"], urls["gs"]))
    stores.wait_for_nothing()
    s3fs.S3FileSystem.retries = 5  # this and the next as users have it
    os.environ["AWS_MAX_ATTEMPTS"] = "5"
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)  # it writes none
    uploads.PART_BYTES = 2**18  # so that the export takes several parts
    spool.SECONDS = 0.2
    try:
        train(small_run(text, run, **changes))
        ends.write_text("done")
    except Exception as error:
        traceback.print_exc()
        ends.write_text(f"{type(error).__name__}: {error}")
    os._exit(0)  # as the command ends: Orbax's threads of a save that failed wait for minutes
