"""Documents as tokens, made once: in memory, or in a cache on disk that is read where it lies.

Axes: N tokens of all documents, D documents.

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
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from v4jax.chat.tokens import CHAT_TOKENS, FIM_BEGIN, FIM_END, FIM_HOLE, FIM_TOKENS
from v4jax.checkpoint.checksums import SUMS_FILE, damage, write_sums
from v4jax.data.config import DataConfig, Source
from v4jax.data.conversations import conversation_tokens
from v4jax.data.documents import Document, name_hash, read_documents, unit_hash
from v4jax.data.files import at, find_files
from v4jax.data.identity import file_marks
from v4jax.data.records import read_records, read_texts
from v4jax.storage import local_path
from v4jax.tokenizer import Tokenizer, document_ids, require_tokens, without_marks

_VERSION = 2
_SOURCES = "sources.json"
"""In a cache: the files that it was made of (v4jax/data/identity.py). Older caches have none."""

_FILES = {"tokens": "<i4", "learned": "u1", "ends": "<i8", "hashes": "<f8"}


class TokenStore(NamedTuple):
    """Tokens of documents, one after another.

    tokens int32 [N]; learned uint8 [N]; ends int64 [D], where each document ends; hashes float64 [D], in [0, 1), of its name
    or content, for the split. fingerprint: equal for equal content.
    """

    tokens: np.ndarray
    learned: np.ndarray
    ends: np.ndarray
    hashes: np.ndarray
    fingerprint: str


def open_store(cfg: DataConfig, source: Source, tokenizer: Tokenizer) -> TokenStore:
    """The source's tokens, from cfg.cache if they are there and intact, else made now (and put there).

    A cache goes by everything its tokens depend on: names, sizes and times of the files, tokenizer,
    settings. One that is damaged, or whose files hold something else at the same size and time, is
    put aside with a line on stderr and made again; a cache is complete or is not there.

    Raises:
      ValueError: anything wrong with the source, or a tokenizer without the special tokens that are needed.
    """
    if source.format == "chat":
        require_tokens(tokenizer, CHAT_TOKENS, "a conversation")
    if cfg.fim_rate > 0 and source.format != "chat":
        require_tokens(tokenizer, FIM_TOKENS, "fim_rate")
    key = _key(cfg, source, tokenizer)
    if not cfg.cache:
        return _in_memory(dataclasses.replace(cfg, cache=""), source, tokenizer, key)
    folder = local_path(cfg.cache, "cache") / f"{source.label}-{key}"
    if folder.is_dir():
        fault = _fault(folder, source)
        if fault is None:
            return _mapped(folder)
        _put_aside(folder, fault)
    _write(folder, cfg, source, tokenizer)
    return _mapped(folder)


def prepare_cache(cfg: DataConfig, tokenizer: Tokenizer) -> None:
    """Makes the caches of all sources that have none."""
    for source in (*cfg.sources, *cfg.evaluate_on):
        open_store(cfg, source, tokenizer)


def _key(cfg: DataConfig, source: Source, tokenizer: Tokenizer) -> str:
    """Changes with everything that the tokens depend on."""
    found = find_files(source).files
    files = [path for _, path in (sorted(found) if source.format == "text" else found)]
    states = [(path.stat().st_size, path.stat().st_mtime_ns) for path in files]
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


# ---- making ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def _in_memory(cfg: DataConfig, source: Source, tokenizer: Tokenizer, key: str) -> TokenStore:
    files = {name: io.BytesIO() for name in _FILES}
    fingerprint = _fill(files, cfg, source, tokenizer)
    arrays = {name: np.frombuffer(file.getvalue(), _FILES[name]) for name, file in files.items()}
    return TokenStore(**arrays, fingerprint=fingerprint)


def _write(folder: pathlib.Path, cfg: DataConfig, source: Source, tokenizer: Tokenizer) -> None:
    """Makes the cache beside its place, then moves it there. Of processes that do so at once, one is first; the rest are equal."""
    marks = file_marks(source)
    work = folder.with_name(f".{folder.name}.{os.getpid()}")
    work.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context((work / name).open("wb")) for name in _FILES}
            fingerprint = _fill(files, cfg, source, tokenizer)
        (work / "fingerprint").write_text(fingerprint)
        (work / _SOURCES).write_text(json.dumps(marks))
        write_sums(work)
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fill(files: dict, cfg: DataConfig, source: Source, tokenizer: Tokenizer) -> str:
    """Writes every document; the fingerprint of what was written."""
    digest, end = hashlib.sha256(), 0
    for tokens_T, learned_T, place in _tokenised(cfg, source, tokenizer):
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
        raise ValueError(f"source: {source.path} has no document that is not empty")
    return digest.hexdigest()[:16]


def _tokenised(
    cfg: DataConfig, source: Source, tokenizer: Tokenizer
) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """(tokens, learned, hash) of each document. A file's hash is its name's, a record's its content's, so that
    equal records fall on one side of the split."""
    if source.format == "chat":
        for place, record in read_records(source):
            with at(place):
                tokens = conversation_tokens(record, source.column, cfg.chat, tokenizer)
                made = *tokens, unit_hash(json.dumps(record))
            yield made
        return
    for index, (place, text, document) in enumerate(_texts(source)):
        with at(place):
            # Before the text is cut for fill-in-middle, which would move a bos into the middle.
            cut = _maybe_fim(cfg, index, without_marks(tokenizer, text))
            ids = np.array(document_ids(tokenizer, cut), np.int32)
            place_in_split = unit_hash(text) if document is None else name_hash(document)
        yield ids, np.ones(len(ids), np.uint8), place_in_split


def _texts(source: Source) -> Iterator[tuple[str, str, Document | None]]:
    """(place, text, file if it is one whole file) of each document."""
    if source.format == "text":
        for document in read_documents(source):
            yield str(document.path), document.text(), document
    else:
        for place, text in read_texts(source):
            yield place, text, None


def _maybe_fim(cfg: DataConfig, index: int, text: str) -> str:
    """A share cfg.fim_rate of the texts as prefix, suffix, middle, cut at two random characters: the middle comes last.

    Source: DeepSeek-V3 report 4.1 (PSM, rate 0.1). Example: "abcdef" cut at 2 and 3 is <begin>ab<hole>def<end>c.
    """
    rng = np.random.default_rng([cfg.seed, index])
    if rng.random() >= cfg.fim_rate:
        return text
    first, second = sorted(rng.integers(0, len(text) + 1, 2))
    return FIM_BEGIN + text[:first] + FIM_HOLE + text[second:] + FIM_END + text[first:second]


# ---- reading ---------------------------------------------------------------------------------------------------------


def _mapped(folder: pathlib.Path) -> TokenStore:
    arrays = {name: np.memmap(folder / name, kind, mode="r") for name, kind in _FILES.items()}
    return TokenStore(**arrays, fingerprint=(folder / "fingerprint").read_text())


def _fault(folder: pathlib.Path, source: Source) -> str | None:
    """Why a cache is not used, in words."""
    if not (folder / SUMS_FILE).is_file():
        return f"damaged ({SUMS_FILE} is missing)"
    wrong = damage(folder)
    if wrong is not None:
        return f"damaged ({wrong})"
    made_of = folder / _SOURCES
    if not made_of.is_file():
        return None
    if json.loads(made_of.read_text())["digest"] == file_marks(source)["digest"]:
        return None
    return f"out of date (files of {source.path} hold something else at the same size and time)"


def _put_aside(folder: pathlib.Path, fault: str) -> None:
    aside = folder.with_name(folder.name + ".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    said = f"token cache {folder} is {fault}; put aside as {aside.name}, made again"
    print(f"v4jax: {said}", file=sys.stderr)
