"""Pieces of documents as tokens, read on demand.

Axes: T tokens of one piece.

Next file to read: v4jax/data/rows.py.
"""

import pathlib

import numpy as np

from v4jax.data.documents import Document
from v4jax.tokenizer import Tokenizer

READ_ROWS = 4
"""Rows of tokens that one piece of a long document fills, about."""


class Pieces:
    """Random access to the pieces of documents, read and tokenised on demand: piece i is tokens int32 [T].

    A document is cut every `step` bytes, then at the next start of a character. Its first piece begins with bos, its
    last one ends with eos. Example: with step 4, "abcdé!" (7 bytes) is bos + "abcd", then "é!" + eos.
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
        bos = [self._tokenizer.bos_token_id] if begin == 0 else []
        eos = [self._tokenizer.eos_token_id] if end == document.size else []
        ids = bos + self._tokenizer.encode(_read_between(document.path, begin, end)) + eos
        return {"tokens": np.array(ids, np.int32)}


def _read_between(path: pathlib.Path, begin: int, end: int) -> str:
    """The characters of a UTF-8 file whose first byte is in [begin, end)."""
    with path.open("rb") as file:
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
        raise ValueError(f"source: {path} changed while it was read: {error}") from None
