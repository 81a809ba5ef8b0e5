"""Compiled programs on disk, so that a run that starts again compiles nothing.

This is JAX's persistent compilation cache. What it stores depends on the program, the compiler, its
flags and the devices, so one folder serves many runs. In a job of several processes JAX lets only
the first one write; the others find its programs if they see the same folder, except on CPUs, where
JAX's keys differ by process.

Next file to read: v4jax/train/goodput.py.
"""

import contextlib
import pathlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from sharding.agreement import agreed
from v4jax.checkpoint.atomic import write_bytes
from v4jax.storage import folder_to_fill


@contextlib.contextmanager
def compile_cache(folder: str) -> Iterator[None]:
    """Within the context, JAX keeps all compiled programs in `folder`; "" changes nothing.

    Every process calls it.

    Raises:
      ValueError: `folder` is a file or may not be written to; every process raises it.
    """
    if not folder:
        yield
        return
    with contextlib.ExitStack() as stack:
        with agreed():  # its own small program goes through the cache already
            path = folder_to_fill(folder, "compile_cache")
            stack.enter_context(_whole_files())
            stack.enter_context(_options(str(path.absolute())))
        yield


@contextlib.contextmanager
def _options(folder: str) -> Iterator[None]:
    """JAX's options within the context: every program counts, however small and quick."""
    options = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    try:
        _set(options)
        yield
    finally:
        _set(before)


def _set(options: dict) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    reset_cache()  # JAX reads the options once


@contextlib.contextmanager
def _whole_files() -> Iterator[None]:
    """Within the context, JAX writes an entry to a temporary name and renames it.

    By itself it writes under the final name. A process that is killed then leaves half an entry,
    which JAX neither uses nor replaces. It has no public place to change that.
    """
    try:
        from jax._src.lru_cache import LRUCache

        before = LRUCache.put
    except (ImportError, AttributeError):
        raise ValueError(
            f"compile_cache: jax {jax.__version__} keeps its cache in another way than those "
            "versions that v4jax knows; leave compile_cache empty and set JAX_COMPILATION_CACHE_DIR"
        ) from None

    def put(cache, key: str, value: bytes) -> None:
        """As LRUCache.put, in two steps."""
        entry = pathlib.Path(cache.path) / f"{key}-cache"
        if cache.eviction_enabled or entry.exists():
            return before(cache, key, value)  # under a lock, or nothing to do
        write_bytes(entry, value)

    setattr(LRUCache, "put", put)  # noqa: B010 (pyright knows only the signature there)
    try:
        yield
    finally:
        setattr(LRUCache, "put", before)  # noqa: B010
