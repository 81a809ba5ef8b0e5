"""Pieces of documents as tokens, read on demand from files or from a store.

Axes: M documents, T tokens of one piece.

Next file to read: v4jax/data/summary.py.
"""

import os
import zlib
from typing import NamedTuple

import numpy as np

from v4jax.data.compressed import failures_named
from v4jax.data.config import DataConfig, Source
from v4jax.data.documents import (
    BYTE_ORDER_MARK,
    Document,
    content,
    fingerprint,
    held_out_of,
    split_documents,
)
from v4jax.data.listing import Listings
from v4jax.data.places import at
from v4jax.data.selection import used_conversations
from v4jax.data.store import open_store
from v4jax.data.tokenised import TokenStore
from v4jax.storage import Remote, is_remote, place
from v4jax.tokenizer import Tokenizer, document_ids

READ_ROWS = 4
"""About how many rows one piece of a long document fills, if rows cut documents."""


class Mark(NamedTuple):
    """Tells sets of pieces apart.

    Attributes:
      documents: changes with the names and sizes of documents (of a store: with its tokens).
      content: changes with every byte.
    """

    documents: str
    content: str


def open_pieces(
    cfg: DataConfig,
    source: Source,
    tokenizer: Tokenizer,
    seq_len: int,
    part: str,
    listings: Listings | None = None,
):
    """(pieces, Mark) of the documents of a source that belong to `part`.

    Args:
      part: "train", "held_out" or "all".
      listings: the run's; None: look up and read the files now.

    Raises:
      ValueError: anything wrong with the source; names it.
    """
    listings = Listings() if listings is None else listings
    if allows_reading_in_place(cfg, source) and not listings[source].compressed:
        documents = listings[source].documents
        return _read_in_place(cfg, source, tokenizer, seq_len, part, documents)
    store = open_store(cfg, source, tokenizer, listings)
    if source.talks:
        chosen_M = used_conversations(cfg, source, store, seq_len, part)
    elif part == "all":
        chosen_M = np.ones(len(store.ends), bool)
    else:
        with at(source.path):
            chosen_M = held_out_of(store.hashes, cfg.held_out) == (part == "held_out")
    mark = f"{store.fingerprint}-{zlib.crc32(chosen_M.tobytes()):08x}"
    if source.paired:
        return StoredPairs(store, np.flatnonzero(chosen_M)), Mark(mark, mark)
    step = seq_len if cfg.packing == "best_fit" else READ_ROWS * seq_len
    pieces = StoredPieces(
        store, np.flatnonzero(chosen_M), step, cfg.masked, first_only=source.talks
    )
    mark = f"{mark}-{pieces.lone}" if pieces.lone else mark
    return pieces, Mark(mark, mark)


def allows_reading_in_place(cfg: DataConfig, source: Source) -> bool:
    """Whether the settings let files of the source be read in place, without a token store.

    A compressed file rules that out all the same: it cannot be read from the middle. So does a
    bucket, since no step should wait for it.
    """
    if source.format != "text" or cfg.cache or is_remote(place(source.path)):
        return False
    return cfg.packing == "split" and cfg.fim_rate == 0


def _read_in_place(
    cfg: DataConfig,
    source: Source,
    tokenizer: Tokenizer,
    seq_len: int,
    part: str,
    documents: list[Document],
):
    """`open_pieces` of documents that are read and tokenised when they are needed."""
    if part != "all":
        with at(source.path):
            train, held_out = split_documents(cfg, documents)
        documents = held_out if part == "held_out" else train
    return Pieces(documents, tokenizer, seq_len), Mark(fingerprint(documents), content(documents))


class StoredPieces:
    """Random access to documents of a store, cut every `step` tokens.

    Piece i is tokens int32 [T], and with `masked` also loss_mask int32 [T]. With `masked`, a
    document's last token is left out if it would be a piece by itself: nothing predicts it, and
    best-fit packing could fill a whole batch with such pieces. `lone` counts them.

    Args:
      documents: indices of the documents in the store.
      first_only: use only the first piece of each document.
    """

    def __init__(
        self, store: TokenStore, documents: np.ndarray, step: int, masked: bool, first_only: bool
    ):
        self._store, self._step, self._masked = store, step, masked
        self._begins = np.concatenate([[0], store.ends[:-1]])[documents]
        self._stops = np.asarray(store.ends)[documents]
        if first_only:
            self._stops = np.minimum(self._stops, self._begins + step)
        lone_M = masked & ((self._stops - self._begins) % step == 1)
        self._stops = self._stops - lone_M
        self.lone = int(lone_M.sum())
        self._ends = np.cumsum(-(-(self._stops - self._begins) // step))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        begin = (
            int(self._begins[which])
            + (index - (int(self._ends[which - 1]) if which else 0)) * self._step
        )
        end = min(begin + self._step, int(self._stops[which]))
        piece = {"tokens": np.array(self._store.tokens[begin:end], np.int32)}
        return (
            piece | {"loss_mask": np.array(self._store.learned[begin:end], np.int32)}
            if self._masked
            else piece
        )

    @property
    def mean_tokens(self) -> float:
        """Mean tokens per piece."""
        return float((self._stops - self._begins).sum()) / len(self)


class StoredPairs:
    """Random access to pairs of a store, each whole.

    Piece i is tokens int32 [T] of the chosen conversation and then of the rejected one, loss_mask
    int32 [T], and rejected int32 [T], which is 1 on tokens of the rejected one.

    Args:
      pairs: numbers of the pairs in the store.
    """

    def __init__(self, store: TokenStore, pairs: np.ndarray):
        ends_M2 = np.asarray(store.ends).reshape(-1, 2)
        begins_M = np.concatenate([[0], ends_M2[:-1, 1]])
        self._store = store
        self._begins, self._middles, self._stops = begins_M[pairs], *ends_M2[pairs].T

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        begin, middle, stop = (x[index] for x in (self._begins, self._middles, self._stops))
        return {
            "tokens": np.array(self._store.tokens[begin:stop], np.int32),
            "loss_mask": np.array(self._store.learned[begin:stop], np.int32),
            "rejected": (np.arange(begin, stop) >= middle).astype(np.int32),
        }

    @property
    def mean_tokens(self) -> float:
        """Mean tokens per pair."""
        return float((self._stops - self._begins).sum()) / len(self)


class Pieces:
    """Random access to the pieces of documents, read and tokenised on demand.

    Piece i is tokens int32 [T]. A document is cut every `step` bytes, or at the next start of a
    character. Its first piece begins with bos, its last one ends with eos.

    Example: with step 4, "abcdé!" (7 bytes) is bos + "abcd", then "é!" + eos.
    """

    def __init__(self, documents: list[Document], tokenizer: Tokenizer, seq_len: int):
        self._documents = documents
        self._tokenizer = tokenizer
        self._step = READ_ROWS * seq_len * tokenizer.bytes_per_token
        # _ends[i]: number of pieces in documents 0 to i.
        self._ends = np.cumsum([-(-document.size // self._step) for document in documents])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        document = self._documents[which]
        begin = (index - (int(self._ends[which - 1]) if which else 0)) * self._step
        end = min(begin + self._step, document.size)
        ends = end == document.size
        text = _read_between(document, begin, end)
        text = text if begin else text.removeprefix(BYTE_ORDER_MARK)
        with at(str(document.path)):
            ids = document_ids(self._tokenizer, text, begins=begin == 0, ends=ends)
        return {"tokens": np.array(ids, np.int32)}

    @property
    def mean_tokens(self) -> float:
        """Mean tokens per piece, roughly; for the shares of a mixture."""
        return (
            sum(document.size for document in self._documents)
            / self._tokenizer.bytes_per_token
            / len(self)
        )


def _read_between(document: Document, begin: int, end: int) -> str:
    """The characters of a document whose first byte is in [begin, end).

    Raises:
      OSError: the file can no longer be read, or has changed. It was good before, so this is a
        failure of the run.
    """
    assert not isinstance(document.path, Remote)  # allows_reading_in_place
    changed = f"{document.path}: changed while it was read"
    with failures_named(document.path), document.path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != document.size:
            raise OSError(f"{changed}: had {document.size} bytes, has {size}")
        file.seek(begin)
        data = file.read(end - begin + 3)  # a character has at most 3 bytes after its first
    first, last = 0, end - begin
    while first < len(data) and data[first] & 0xC0 == 0x80:
        first += 1
    while last < len(data) and data[last] & 0xC0 == 0x80:
        last += 1
    try:
        return data[first:last].decode("utf-8")
    except UnicodeDecodeError as error:
        raise OSError(f"{changed}: {error}") from None
