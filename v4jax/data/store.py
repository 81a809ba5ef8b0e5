"""Documents as tokens, made once and kept in memory or in a memory-mapped cache on disk.

Axes: M documents, T tokens of one document or of all.

Next file to read: v4jax/data/identity.py.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from v4jax.chat.tokens import CHAT_TOKENS, FIM_BEGIN, FIM_END, FIM_HOLE, FIM_TOKENS
from v4jax.checkpoint.checksums import SUMS_FILE, damage, write_sums
from v4jax.data.checks import unread_keys
from v4jax.data.config import DataConfig, Source
from v4jax.data.conversations import conversation_tokens
from v4jax.data.documents import Document, name_hash, unit_hash
from v4jax.data.files import at
from v4jax.data.listing import Listing, Listings
from v4jax.data.records import read_records, read_texts
from v4jax.stderr import say
from v4jax.storage import local_path
from v4jax.tokenizer import Tokenizer, document_ids
from v4jax.tokenizer.checks import require_tokens
from v4jax.tokenizer.documents import without_marks

_VERSION = 2
_SOURCES = "sources.json"
"""File in a cache that lists its source files (Listing.marks); older caches have none."""

_UNREAD_KEPT = 100
_FILES = {"tokens": "<i4", "learned": "u1", "ends": "<i8", "hashes": "<f8"}


class TokenStore(NamedTuple):
    """Tokens of documents, one after another.

    Attributes:
      tokens: int32 [T].
      learned: uint8 [T], 1 on tokens to be learned.
      ends: int64 [M], where each document ends.
      hashes: float64 [M], in [0, 1), of each document's name or content; they decide the split.
      fingerprint: equal for equal content.
      empty: how many records were left out for their empty text; 0 if an older cache did not count.
      unread: keys of conversations that are not read (checks.unread_keys), some if there are many.
    """

    tokens: np.ndarray
    learned: np.ndarray
    ends: np.ndarray
    hashes: np.ndarray
    fingerprint: str
    empty: int = 0
    unread: tuple[str, ...] = ()


def open_store(
    cfg: DataConfig, source: Source, tokenizer: Tokenizer, listings: Listings | None = None
) -> TokenStore:
    """The source's tokens, from an intact cache in cfg.cache, or else made now (and put there).

    A cache is identified by everything its tokens depend on: names, sizes and times of the files,
    tokenizer, settings. A damaged cache is put aside with a line on stderr and made again. So is an
    outdated one, whose files have other content at the same size and time. A cache is always
    complete.

    Args:
      listings: the run's, which opens each store once; None: look the files up now.

    Raises:
      ValueError: anything wrong with the source, or a tokenizer without the special tokens that the
        source needs.
    """
    listing = (Listings() if listings is None else listings)[source]
    if source.format == "chat":
        require_tokens(tokenizer, CHAT_TOKENS, "a conversation")
    if cfg.fim_rate > 0 and source.format != "chat":
        require_tokens(tokenizer, FIM_TOKENS, "fim_rate")
    key = _key(cfg, listing, tokenizer)
    known = cfg.cache, key
    if known not in listing.stores:
        listing.stores[known] = _opened(cfg, listing, tokenizer, key)
    return listing.stores[known]


def prepare_cache(cfg: DataConfig, tokenizer: Tokenizer, listings: Listings | None = None) -> None:
    """Makes the caches of all sources that have none."""
    for source in (*cfg.sources, *cfg.evaluate_on):
        open_store(cfg, source, tokenizer, listings)


def _key(cfg: DataConfig, listing: Listing, tokenizer: Tokenizer) -> str:
    """A hash that changes with everything the tokens depend on."""
    source, found = listing.source, listing.found.files
    files = [path for _, path in (sorted(found) if source.format == "text" else found)]
    states = [listing.states[path] for path in files]
    about = [
        _VERSION,
        source.format,
        source.column,
        tokenizer.fingerprint,
        list(zip(map(str, files), states, strict=True)),
    ]
    if source.format == "chat":
        about.append(dataclasses.asdict(cfg.chat))
    elif cfg.fim_rate:
        about += [cfg.fim_rate, cfg.seed]
    return hashlib.sha256(json.dumps(about).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _opened(cfg: DataConfig, listing: Listing, tokenizer: Tokenizer, key: str) -> TokenStore:
    """The tokens of a source, from its cache or made now."""
    if not cfg.cache:
        return _in_memory(cfg, listing, tokenizer, f"{key} {listing.marks['digest']}")
    folder = local_path(cfg.cache, "cache") / f"{listing.source.label}-{key}"
    if folder.is_dir():
        fault = _fault(folder, listing)
        if fault is None:
            return _mapped(folder)
        _put_aside(folder, fault, listing)
    if not folder.is_dir():
        _write(folder, cfg, listing, tokenizer)
    return _mapped(folder)


# ---- making --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _in_memory(cfg: DataConfig, listing: Listing, tokenizer: Tokenizer, key: str) -> TokenStore:
    """The tokens of a source, made now and kept in memory."""
    files = {name: io.BytesIO() for name in _FILES}
    filled = _fill(files, cfg, listing, tokenizer)
    arrays = {name: np.frombuffer(file.getvalue(), _FILES[name]) for name, file in files.items()}
    return TokenStore(**arrays, **filled._asdict())


def _write(folder: pathlib.Path, cfg: DataConfig, listing: Listing, tokenizer: Tokenizer) -> None:
    """Makes the cache in a temporary folder, then moves it to its place.

    If several processes do so at once, the first one wins; the caches of the others are equal.
    """
    marks = listing.marks
    work = folder.with_name(f".{folder.name}.{os.getpid()}")
    work.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context((work / name).open("wb")) for name in _FILES}
            filled = _fill(files, cfg, listing, tokenizer)
        (work / "fingerprint").write_text(filled.fingerprint)
        (work / _SOURCES).write_text(json.dumps(marks | filled._asdict()))
        write_sums(work)
        _move(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class _Filled(NamedTuple):
    """What is known of a store beside its arrays: see TokenStore."""

    fingerprint: str
    empty: int
    unread: tuple[str, ...]


def _fill(files: dict, cfg: DataConfig, listing: Listing, tokenizer: Tokenizer) -> _Filled:
    """Writes every document."""
    digest, end, empty, unread = hashlib.sha256(), 0, 0, set()
    for made in _tokenised(cfg, listing, tokenizer):
        if made is None:
            empty += 1
            continue
        tokens_T, learned_T, place, keys = made
        unread.update(keys if len(unread) < _UNREAD_KEPT else ())
        end += len(tokens_T)
        parts = {
            "tokens": tokens_T,
            "learned": learned_T,
            "ends": np.array([end]),
            "hashes": np.array([place]),
        }
        for name, part in parts.items():
            data = part.astype(_FILES[name]).tobytes()
            files[name].write(data)
            digest.update(data)
    if not end:
        raise ValueError(f"source: {listing.source.path}: every document is empty")
    return _Filled(digest.hexdigest()[:16], empty, tuple(sorted(unread)))


def _tokenised(
    cfg: DataConfig, listing: Listing, tokenizer: Tokenizer
) -> Iterator[tuple[np.ndarray, np.ndarray, float, list[str]] | None]:
    """(tokens, learned, hash, keys that are not read) of each document; None for an empty text.

    A file's hash is that of its name. A record's is that of its content, so that equal records are
    on one side of the split.
    """
    source = listing.source
    if source.format == "chat":
        for place, record in read_records(source, listing.found):
            with at(place):
                tokens = conversation_tokens(record, source.column, cfg.chat, tokenizer)
                unread = unread_keys(record, source.column)
                made = *tokens, unit_hash(json.dumps(record)), unread
            yield made
        return
    index = 0
    for place, text, document in _texts(listing):
        if not text:
            yield None
            continue
        with at(place):
            # bos and eos are removed first: fill-in-middle would move a bos into the middle.
            cut = _maybe_fim(cfg, index, without_marks(tokenizer, text))
            ids = np.array(document_ids(tokenizer, cut), np.int32)
            place_in_split = unit_hash(text) if document is None else name_hash(document)
        index += 1
        yield ids, np.ones(len(ids), np.uint8), place_in_split, []


def _texts(listing: Listing) -> Iterator[tuple[str, str, Document | None]]:
    """(place, text, the file if the document is a whole file) of each document."""
    if listing.source.format == "text":
        for document in listing.documents:
            yield str(document.path), document.text(), document
    else:
        for place, text in read_texts(listing.source, listing.found):
            yield place, text, None


def _maybe_fim(cfg: DataConfig, index: int, text: str) -> str:
    """Rewrites a share cfg.fim_rate of the texts as prefix, suffix, middle.

    The text is cut at two random characters, and the middle comes last. Source: DeepSeek-V3 report
    4.1 (PSM, rate 0.1).

    Example: "abcdef" cut at 2 and 3 is <begin>ab<hole>def<end>c.
    """
    rng = np.random.default_rng([cfg.seed, index])
    if rng.random() >= cfg.fim_rate:
        return text
    first, second = sorted(rng.integers(0, len(text) + 1, 2))
    return FIM_BEGIN + text[:first] + FIM_HOLE + text[second:] + FIM_END + text[first:second]


# ---- reading -------------------------------------------------------------------------------------


def _mapped(folder: pathlib.Path) -> TokenStore:
    """The tokens in a cache, memory-mapped."""
    arrays = {name: np.memmap(folder / name, kind, mode="r") for name, kind in _FILES.items()}
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


def _fault(folder: pathlib.Path, listing: Listing) -> _Fault | None:
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


def _put_aside(folder: pathlib.Path, fault: _Fault, listing: Listing) -> None:
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
    if _fault(taken, listing) is None:
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
