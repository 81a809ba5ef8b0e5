"""The documents of a source as tokens, written one after another.

Axes: M documents, T tokens of one document or of all.

Next file to read: v4jax/data/token_cache.py.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from v4jax.chat.tokens import FIM_BEGIN, FIM_END, FIM_HOLE
from v4jax.data.checks import unread_keys
from v4jax.data.config import DataConfig
from v4jax.data.conversations import conversation_tokens
from v4jax.data.documents import Document, name_hash, unit_hash
from v4jax.data.listing import Listing
from v4jax.data.pairs import pair_tokens
from v4jax.data.places import at
from v4jax.data.records import read_records, read_texts
from v4jax.tokenizer import Tokenizer, document_ids
from v4jax.tokenizer.documents import without_marks

_UNREAD_KEPT = 100
FILES = {"tokens": "<i4", "learned": "u1", "ends": "<i8", "hashes": "<f8"}


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


class Filled(NamedTuple):
    """What is known of a store beside its arrays: see TokenStore."""

    fingerprint: str
    empty: int
    unread: tuple[str, ...]


def fill(files: dict, cfg: DataConfig, listing: Listing, tokenizer: Tokenizer) -> Filled:
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
            data = part.astype(FILES[name]).tobytes()
            files[name].write(data)
            digest.update(data)
    if not end:
        raise ValueError(f"source: {listing.source.path}: every document is empty")
    return Filled(digest.hexdigest()[:16], empty, tuple(sorted(unread)))


def _tokenised(
    cfg: DataConfig, listing: Listing, tokenizer: Tokenizer
) -> Iterator[tuple[np.ndarray, np.ndarray, float, list[str]] | None]:
    """(tokens, learned, hash, keys that are not read) of each document; None for an empty text.

    A pair is two documents, chosen and rejected. A file's hash is that of its name. A record's is
    that of its content, so that equal records are on one side of the split.
    """
    source = listing.source
    if source.paired:
        for place, record in read_records(source, listing.found):
            with at(place):
                pair, place_in_split, unread = pair_tokens(record, cfg.chat, tokenizer)
            for tokens in pair:
                yield *tokens, place_in_split, unread
        return
    if source.talks:
        for place, record in read_records(source, listing.found):
            with at(place):
                tokens = conversation_tokens(record, source.column, cfg.chat, tokenizer)
                unread = unread_keys(record, source.columns, record[source.column])
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
