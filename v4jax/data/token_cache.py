"""A folder with the tokens of a source: made whole, checked when it is opened, put aside when bad.

Next file to read: v4jax/data/identity.py.
"""

import contextlib
import json
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import numpy as np

from v4jax.checkpoint.checksums import SUMS_FILE, damage, write_sums
from v4jax.data.config import DataConfig
from v4jax.data.listing import Listing
from v4jax.data.tokenised import FILES, TokenStore, fill
from v4jax.stderr import say
from v4jax.tokenizer import Tokenizer

_SOURCES = "sources.json"
"""File in a cache that lists its source files (Listing.marks); older caches have none."""


def write(folder: pathlib.Path, cfg: DataConfig, listing: Listing, tokenizer: Tokenizer) -> None:
    """Makes the cache in a temporary folder, then moves it to its place.

    If several processes do so at once, the first one wins; the caches of the others are equal.
    """
    marks = listing.marks
    work = folder.with_name(f".{folder.name}.{os.getpid()}")
    work.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context((work / name).open("wb")) for name in FILES}
            filled = fill(files, cfg, listing, tokenizer)
        (work / "fingerprint").write_text(filled.fingerprint)
        (work / _SOURCES).write_text(json.dumps(marks | filled._asdict()))
        write_sums(work)
        _move(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def mapped(folder: pathlib.Path) -> TokenStore:
    """The tokens in a cache, memory-mapped."""
    arrays = {name: np.memmap(folder / name, kind, mode="r") for name, kind in FILES.items()}
    fingerprint = (folder / "fingerprint").read_text()
    made = _made_of(folder)
    empty, unread = made.get("empty", 0), tuple(made.get("unread", ()))
    return TokenStore(**arrays, fingerprint=fingerprint, empty=empty, unread=unread)


def _made_of(folder: pathlib.Path) -> dict[str, Any]:
    """What a cache says about its source files; {} for an older cache."""
    path = folder / _SOURCES
    return json.loads(path.read_text()) if path.is_file() else {}


class _Fault(NamedTuple):
    """Why a cache is not used: in one word, and in full."""

    word: str
    why: str


def fault_in(folder: pathlib.Path, listing: Listing) -> _Fault | None:
    """What is wrong with a cache; None for a good one."""
    if not (folder / SUMS_FILE).is_file():
        return _Fault("damaged", f"{SUMS_FILE} is missing")
    try:
        wrong = damage(folder)
        digest = None if wrong else _made_of(folder).get("digest")
    except FileNotFoundError as error:  # another process is putting it aside
        return _Fault("damaged", f"{error.filename} is missing")
    if wrong is not None:
        return _Fault("damaged", wrong)
    if digest in (None, listing.marks["digest"]):
        return None
    path = listing.source.path
    return _Fault("outdated", f"files of {path} hold something else at the same size and time")


def put_aside(folder: pathlib.Path, fault: _Fault, listing: Listing) -> None:
    """Moves a bad cache out of its place, unless another process has done so.

    That process may meanwhile have made a good cache there. If this one moves it by mistake, it
    moves it back.
    """
    taken = folder.with_name(f".{folder.name}.{os.getpid()}.aside")
    shutil.rmtree(taken, ignore_errors=True)
    try:
        folder.rename(taken)
    except FileNotFoundError:
        return
    if fault_in(taken, listing) is None:
        _move(taken, folder)
        return
    aside = folder.with_name(f"{folder.name}.{fault.word}")
    shutil.rmtree(aside, ignore_errors=True)
    _move(taken, aside)
    say(
        f"token cache {folder} is {fault.word} ({fault.why}); put aside as {aside.name}, made again"
    )


def _move(folder: pathlib.Path, to: pathlib.Path) -> None:
    """Renames a folder, or deletes it if another process was first to fill that place."""
    try:
        folder.rename(to)
    except OSError:
        if not to.is_dir():
            raise
        shutil.rmtree(folder, ignore_errors=True)
