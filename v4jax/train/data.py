"""Text files to packed batches of tokens: the same batches on every machine, resumable at any step.

Axes: B batch, S query positions, T tokens of one piece.

    files -> documents -> train | held out          by a hash of each file's path
    train documents -> pieces, shuffled anew each epoch; row r of the global batch takes pieces r, r + B, r + 2B, ...
    pieces of one row -> bos + tokens + eos, concatenated, cut every S tokens -> [B, S]

Every row being a stream of its own, a batch mixes B documents, and what row r holds does not depend on the number of
processes. Long documents are read in pieces of a few rows, so that B rows at a time do not dwell on B long files.

Next file to read: v4jax/train/loss.py.
"""

import codecs
import dataclasses
import hashlib
import itertools
import json
import pathlib
import sysconfig
from collections.abc import Awaitable, Iterable, Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np

from v4jax.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

_STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_READ_ROWS = 4
"""Rows of tokens that one piece of a long document fills, about."""

Batch = dict[str, np.ndarray]
"""tokens int32 [B,S], and segment_ids int32 [B,S]: 1, 2, ... per document of the row, 0 where a row is padded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text to train on, and how it is cut.

    Fields:
      source: "stdlib", the sources of the running Python's standard library without its tests; or a folder of
        UTF-8 text files ("./stdlib" for a folder of that name).
      tokenizer: "byte", or a Hugging Face tokenizer.json, or a directory that holds one.
      glob: which files of the folder are documents; empty files and names that start with a dot are left out.
      held_out: share of the documents kept for evaluation; at least one document is.
      seed: order of the training documents; the split does not depend on it.

    Raises:
      ValueError: naming the field, the value and the rule.
    """

    source: str = "stdlib"
    tokenizer: str = "byte"
    glob: str = "**/*"
    held_out: float = 0.02
    seed: int = 0

    def __post_init__(self):
        for name in ("source", "tokenizer", "glob"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name}: got {getattr(self, name)!r}; must be a string that is not empty")
        if pathlib.PurePath(self.glob).is_absolute() or ".." in pathlib.PurePath(self.glob).parts:
            raise ValueError(f"glob: got {self.glob!r}; must be relative to the source folder, without '..'")
        if isinstance(self.held_out, bool) or not isinstance(self.held_out, float) or not 0 < self.held_out < 1:
            raise ValueError(f"held_out: got {self.held_out!r}; must be a share in (0, 1)")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: got {self.seed!r}; must be an integer in [0, 2**32)")


class Document(NamedTuple):
    """One UTF-8 file: its path relative to the source, with '/' on every system; the file itself; its bytes."""

    name: str
    path: pathlib.Path
    size: int


def tokenizer_of(cfg: DataConfig) -> Tokenizer:
    """The tokenizer that cfg names."""
    return ByteTokenizer() if cfg.tokenizer == "byte" else load_tokenizer(cfg.tokenizer)


def read_documents(cfg: DataConfig) -> list[Document]:
    """All documents of the source, sorted by name; each is read once here, to check that it is UTF-8.

    Of the standard library, files that are not UTF-8 are left out; in a folder they are an error.

    Raises:
      ValueError: no such folder, no document in it, or a file of it that is not UTF-8 text; names it.
    """
    if cfg.source == "stdlib":
        root, glob = pathlib.Path(sysconfig.get_paths()["stdlib"]), "**/*.py"
    else:
        root, glob = pathlib.Path(cfg.source).expanduser(), cfg.glob
    if not root.is_dir():
        raise ValueError(f"source: {root} is no folder; expected a folder of UTF-8 text files, or 'stdlib'")
    documents = []
    for path in root.glob(glob):
        parts = path.relative_to(root).parts
        skipped = _STDLIB_SKIPPED.intersection(parts) if cfg.source == "stdlib" else ()
        if skipped or any(part.startswith(".") for part in parts) or not path.is_file():
            continue
        fault, size = _utf8_fault(path)
        if fault and cfg.source != "stdlib":
            raise ValueError(f"source: {path} is not UTF-8 text ({fault}); remove it or narrow glob={cfg.glob!r}")
        if size and not fault:
            documents.append(Document("/".join(parts), path, size))
    if not documents:
        raise ValueError(f"source: {root} has no text in files matching {glob!r}; expected UTF-8 text files")
    return sorted(documents)


def split_documents(cfg: DataConfig, documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(train, held out): held out are the documents whose hashed name falls below cfg.held_out.

    The hash sees the name only, so a file stays on its side whatever is added beside it, on every machine. Of few
    documents chance may leave a side empty: then the lowest hash is held out, or the highest is trained on.

    Raises:
      ValueError: fewer than two documents.
    """
    if len(documents) < 2:
        raise ValueError(
            f"source: {cfg.source} has {len(documents)} document(s); at least 2 files are needed, to train and hold out"
        )
    ranked = sorted(documents, key=lambda document: _unit_hash(document.name))
    below = sum(_unit_hash(document.name) < cfg.held_out for document in ranked)
    below = min(max(below, 1), len(ranked) - 1)
    return sorted(ranked[below:]), sorted(ranked[:below])


def train_batches(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    seq_len: int,
    batch_size: int,
    *,
    vocab_size: int,
    rows: Sequence[int] | None = None,
) -> grain.DatasetIterator:
    """Endless training batches; the given rows of them (None: all), [len(rows), seq_len].

    The iterator has get_state and set_state, and Orbax saves and loads it as a checkpointable: each process writes the
    positions of its rows, and reads those of any process, so another number of processes can go on. Restoring onto
    other documents or sizes raises ValueError rather than go on elsewhere.

    Raises:
      ValueError: sizes that do not fit one another, a tokenizer wider than the model, or as read_documents does.
    """
    rows = _check_sizes(tokenizer, seq_len, batch_size, vocab_size, rows)
    documents, _ = split_documents(cfg, read_documents(cfg))
    pieces = grain.MapDataset.source(_Pieces(documents, tokenizer, seq_len)).seed(cfg.seed).shuffle().repeat()
    settings = {
        "documents": _fingerprint(documents),
        "tokenizer": f"{type(tokenizer).__name__} of {tokenizer.vocab_size}",
        "seed": cfg.seed,
        "seq_len": seq_len,
        "batch_size": batch_size,
    }
    return iter(_StackedRows([_packed(pieces[row::batch_size], seq_len) for row in rows], rows, settings))


def held_out_batches(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    seq_len: int,
    batch_size: int,
    *,
    vocab_size: int,
    rows: Sequence[int] | None = None,
    max_batches: int | None = None,
) -> list[Batch]:
    """The held-out documents once, in a fixed mixed order; the last batch is filled up with rows of segment 0.

    `rows` of each batch (None: all); the number of batches does not depend on them. max_batches bounds the list (None:
    all of it).

    Raises:
      ValueError: as train_batches does.
    """
    rows = _check_sizes(tokenizer, seq_len, batch_size, vocab_size, rows)
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches: got {max_batches}; must be at least 1, or None")
    _, documents = split_documents(cfg, read_documents(cfg))
    pieces = grain.MapDataset.source(_Pieces(documents, tokenizer, seq_len)).seed(0).shuffle()
    limit = None if max_batches is None else max_batches * batch_size
    packed = itertools.islice(_packed(pieces, seq_len), limit)
    every = [(row["tokens"], row["tokens_segment_ids"]) for row in packed]
    empty = np.zeros(seq_len, np.int32)
    every += [(empty, empty)] * (-len(every) % batch_size)
    return [_stack([every[begin + row] for row in rows]) for begin in range(0, len(every), batch_size)]


def unigram_loss(train: Iterable[Batch], held_out: Iterable[Batch], vocab_size: int) -> float:
    """Nats per predicted token of held_out under the token counts of train: what a model without context reaches.

        - mean over held-out targets of ln((count[target] + 1) / (sum(count) + vocab_size))

    Both count the tokens a model is asked to predict: those that have a predecessor in their segment. Pass a bounded
    train, such as itertools.islice(train_batches(...), 100).

    Raises:
      ValueError: held_out has no such token.
    """
    count = np.zeros(vocab_size, np.int64)
    for batch in train:
        count += np.bincount(_targets(batch), minlength=vocab_size)
    log_p = np.log(count + 1.0) - np.log(count.sum() + vocab_size)
    targets = [_targets(batch) for batch in held_out]
    if not sum(map(len, targets)):
        raise ValueError("held_out: got no token that has a predecessor in its segment; there is nothing to predict")
    return float(-np.mean(log_p[np.concatenate(targets)]))


# ---- pieces ----------------------------------------------------------------------------------------------------------


class _Pieces:
    """Random access to the pieces of documents, read and tokenised on demand: piece i is tokens int32 [T].

    A document is cut every `step` bytes, then at the next start of a character. Its first piece begins with bos, its
    last one ends with eos. Example: with step 4, "abcdé!" (7 bytes) is bos + "abcd", then "é!" + eos.
    """

    def __init__(self, documents: list[Document], tokenizer: Tokenizer, seq_len: int):
        self._documents = documents
        self._tokenizer = tokenizer
        self._step = _READ_ROWS * seq_len * tokenizer.bytes_per_token
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


def _utf8_fault(path: pathlib.Path) -> tuple[str, int]:
    """("" or why the file is no UTF-8 text, its size in bytes up to there)."""
    decoder, size = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with path.open("rb") as file:
            while data := file.read(1 << 20):
                decoder.decode(data)
                size += len(data)
            decoder.decode(b"", final=True)
    except (OSError, UnicodeDecodeError) as error:
        return f"{type(error).__name__}: {error.strerror if isinstance(error, OSError) else error.reason}", size
    return "", size


def _unit_hash(name: str) -> float:
    """A number in [0, 1) from the first 8 bytes of SHA-256 of the name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


def _fingerprint(documents: list[Document]) -> str:
    """Changes when a document is added, removed, renamed or resized."""
    listing = "\n".join(f"{document.size} {document.name}" for document in documents)
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]


# ---- rows ------------------------------------------------------------------------------------------------------------


def _packed(pieces: grain.MapDataset, seq_len: int) -> grain.IterDataset:
    """Rows of seq_len tokens; each row counts its segments from 1, also where it goes on with a piece cut before it."""
    # No read-ahead threads: reading a piece takes microseconds, and every row would start 16 of them.
    in_line = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return grain.experimental.ConcatThenSplitIterDataset(
        pieces.to_iter_dataset(in_line), length_struct={"tokens": seq_len}
    )


class _StackedRows(grain.IterDataset):
    """Stacks one row of each parent into a batch; `numbers` are their places in the global batch."""

    def __init__(self, rows: list[grain.IterDataset], numbers: list[int], settings: dict):
        super().__init__(rows)
        self._numbers, self._settings = numbers, settings

    def __iter__(self) -> grain.DatasetIterator:
        return _StackedRowsIterator([iter(row) for row in self._parents], self._numbers, self._settings)


class _StackedRowsIterator(grain.DatasetIterator):
    def __init__(self, rows: list[grain.DatasetIterator], numbers: list[int], settings: dict):
        super().__init__(rows)
        self._numbers, self._settings = numbers, settings

    def __next__(self) -> Batch:
        rows = [next(row) for row in self._parents]
        return _stack([(row["tokens"], row["tokens_segment_ids"]) for row in rows])

    def get_state(self) -> dict:
        """Small and free of arrays, so that JSON keeps it. Rows go by their number in the global batch."""
        rows = {str(number): row.get_state() for number, row in zip(self._numbers, self._parents, strict=True)}
        return {"settings": self._settings, "rows": rows}

    def set_state(self, state: dict) -> None:
        for name, value in self._settings.items():
            was = state["settings"].get(name)
            if was != value:
                raise ValueError(
                    f"data position: was saved with {name} {was}, this run has {value}; only the same can go on"
                )
        for number, row in zip(self._numbers, self._parents, strict=True):
            if str(number) not in state["rows"]:
                raise ValueError(f"data position: has no row {number}; a file of the checkpoint is missing")
            saved = state["rows"][str(number)]
            # Orbax keeps the state as JSON, which makes lists of tuples. grain 0.2.18 compares these slices with a
            # tuple, takes an empty remainder for a real one, and silently drops a whole document.
            slices = {name: tuple(ends) for name, ends in saved["remainder_slices"].items()}
            row.set_state(saved | {"remainder_slices": slices})

    # Orbax calls these two. grain's own would want one file per process again, from the same number of processes.

    async def save(self, directory) -> Awaitable[None]:
        """Writes this process's rows, as they are now, to a file of its own; in the background."""
        name, text = f"process_{jax.process_index()}.json", json.dumps(self.get_state())

        async def write():
            (await directory.await_creation() / name).write_text(text)

        return write()

    async def load(self, directory) -> Awaitable[None]:
        """Sets the position from the rows that all processes wrote."""

        async def read():
            states = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
            if not states or isinstance(states[0]["rows"], list):
                raise ValueError(
                    f"data position: {directory} has none, or one of an older v4jax; use a new run directory"
                )
            rows = {number: row for state in states for number, row in state["rows"].items()}
            self.set_state({"settings": states[0]["settings"], "rows": rows})

        return read()


def _stack(rows: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
    tokens, segment_ids = zip(*rows, strict=True)
    return {"tokens": np.stack(tokens), "segment_ids": np.stack(segment_ids)}


def _targets(batch: Batch) -> np.ndarray:
    """The tokens of a batch that have a predecessor in their segment, [number of them]."""
    tokens_BS, segment_ids_BS = np.asarray(batch["tokens"]), np.asarray(batch["segment_ids"])
    follows = (segment_ids_BS[:, 1:] == segment_ids_BS[:, :-1]) & (segment_ids_BS[:, 1:] > 0)
    return tokens_BS[:, 1:][follows]


def _check_sizes(
    tokenizer: Tokenizer, seq_len: int, batch_size: int, vocab_size: int, rows: Sequence[int] | None
) -> list[int]:
    """The rows, all of them for None."""
    if seq_len < 2:
        raise ValueError(f"seq_len: got {seq_len}; must be at least 2, a token and the one it predicts")
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}; must be at least 1")
    rows = list(range(batch_size)) if rows is None else list(rows)
    if not rows or sorted(set(rows)) != rows or rows[0] < 0 or rows[-1] >= batch_size:
        raise ValueError(f"rows: got {rows}; must be one or more rows of the batch, in [0, {batch_size}), ascending")
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"vocab_size: got {vocab_size}; the tokenizer has ids up to {tokenizer.vocab_size - 1}, so it must be at "
            f"least {tokenizer.vocab_size}"
        )
    return rows
