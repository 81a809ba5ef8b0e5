"""Turns sources into packed batches of tokens: the same on every machine, resumable at any step.

Axes: B batch, S positions.

    sources -> documents -> train | held out
        by a hash of each file's path, or of each record
    train documents -> pieces, shuffled anew each epoch, sources mixed
        row r of the batch takes pieces r, r + B, r + 2B, ...
    pieces of one row -> [B, S]
        concatenated and cut every S tokens, or fitted whole into rows

Each row is a stream of its own. So a batch mixes B documents, and the content of row r does not
depend on the number of processes. A long document is read in pieces of a few rows each, so that the
batch does not stay on the same B long files for long. Another length or batch size needs another
call of `train_batches`.

Next file to read: v4jax/train/loss.py.
"""

import itertools
from collections.abc import Iterable, Sequence

import grain
import numpy as np

from v4jax.data.config import DataConfig, Source
from v4jax.data.identity import settings_of
from v4jax.data.listing import Listings
from v4jax.data.mixture import Joined, shuffled
from v4jax.data.pieces import open_pieces
from v4jax.data.rows import Batch, StackedRows, packed, stack
from v4jax.tokenizer import Tokenizer


def train_batches(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    seq_len: int,
    batch_size: int,
    *,
    vocab_size: int,
    rows: Sequence[int] | None = None,
    listings: Listings | None = None,
) -> grain.DatasetIterator:
    """Endless training batches; only the given rows of each (None: all), [len(rows), seq_len].

    The iterator has get_state and set_state, and Orbax saves and loads it as a checkpointable. Each
    process writes the positions of its own rows and can read those of any process, so a run may
    resume on another number of processes. Restoring onto other documents or sizes raises
    ValueError.

    Args:
      vocab_size: the model's; the tokenizer's must not be larger.
      listings: the run's, so that files are looked up and read once; None: look them up now.

    Raises:
      ValueError: sizes that do not fit one another, a tokenizer wider than the model, or what
        open_pieces raises.
    """
    rows = _check_sizes(tokenizer, seq_len, batch_size, vocab_size, rows)
    listings = Listings() if listings is None else listings
    parts, marks = zip(
        *(
            open_pieces(cfg, source, tokenizer, seq_len, "train", listings)
            for source in cfg.sources
        ),
        strict=True,
    )
    weights, names = (
        [source.weight for source in cfg.sources],
        [source.label for source in cfg.sources],
    )
    pieces = shuffled(parts, weights, names, cfg.seed)
    settings = settings_of(cfg, tokenizer, seq_len, batch_size, listings)
    settings["documents"] = " ".join(mark.documents for mark in marks)
    settings["content"] = " ".join(mark.content for mark in marks)
    streams = [packed(pieces[row::batch_size], seq_len, cfg.packing, cfg.marks) for row in rows]
    return iter(StackedRows(streams, rows, settings))


def held_out_batches(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    seq_len: int,
    batch_size: int,
    *,
    vocab_size: int,
    rows: Sequence[int] | None = None,
    max_batches: int | None = None,
    of: Sequence[tuple[Source, str]] | None = None,
    listings: Listings | None = None,
) -> list[Batch]:
    """The held-out documents of all sources, once each, in a fixed mixed order.

    Rows of segment 0 fill up the last batch. The number of batches does not depend on `rows`.

    Args:
      rows: which rows of each batch to return; None: all.
      max_batches: length of the list at most; None: no limit.
      of: sources to read instead, each with its part, "held_out" or "all".
      listings: as for train_batches.

    Raises:
      ValueError: what train_batches raises, max_batches below 1, or no token to predict.
    """
    rows = _check_sizes(tokenizer, seq_len, batch_size, vocab_size, rows)
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches: got {max_batches}; must be at least 1, or None")
    parts = [
        open_pieces(cfg, source, tokenizer, seq_len, part, listings)[0]
        for source, part in of or [(s, "held_out") for s in cfg.sources]
    ]
    pieces = grain.MapDataset.source(Joined(parts)).seed(0).shuffle()
    limit = None if max_batches is None else max_batches * batch_size
    every = list(itertools.islice(packed(pieces, seq_len, cfg.packing, cfg.marks), limit))
    if not any(predicted_tokens(stack([row])).size for row in every):
        raise ValueError(
            f"held_out: got no token to predict in {len(every)} row(s) of seq_len={seq_len}: none "
            "has a predecessor in its document; raise seq_len or held_out, or set eval_batches to 0"
        )
    empty = {name: np.zeros_like(value) for name, value in every[0].items()}
    every += [empty] * (-len(every) % batch_size)
    return [
        stack([every[begin + row] for row in rows]) for begin in range(0, len(every), batch_size)
    ]


def held_out_sets(
    cfg: DataConfig, *args, listings: Listings | None = None, **kwargs
) -> dict[str, list[Batch]]:
    """`held_out_batches` of each evaluation set, by name.

    "held_out" covers all sources. Where there are several, each has its own set under its label.
    Each source of cfg.evaluate_on has one too.
    """
    named = {"held_out": None}
    if len(cfg.sources) > 1:
        named |= {source.label: [(source, "held_out")] for source in cfg.sources}
    named |= {source.label: [(source, "all")] for source in cfg.evaluate_on}
    listings = Listings() if listings is None else listings
    return {
        name: held_out_batches(cfg, *args, of=of, listings=listings, **kwargs)
        for name, of in named.items()
    }


def unigram_loss(train: Iterable[Batch], held_out: Iterable[Batch], vocab_size: int) -> float:
    """Nats per predicted token of held_out under the token counts of train.

    A model without context reaches this loss:

        - mean over held-out targets of ln((count[target] + 1) / (sum(count) + vocab_size))

    Both sides count only the tokens that a model predicts: those with a predecessor in their
    segment and, in conversations, those to be learned. Pass a bounded train, such as
    itertools.islice(train_batches(...), 100).

    Raises:
      ValueError: held_out has no such token.
    """
    count = np.zeros(vocab_size, np.int64)
    for batch in train:
        count += np.bincount(predicted_tokens(batch), minlength=vocab_size)
    log_p = np.log(count + 1.0) - np.log(count.sum() + vocab_size)
    targets = [predicted_tokens(batch) for batch in held_out]
    if not sum(map(len, targets)):
        raise ValueError(
            "held_out: got no token that has a predecessor in its segment; "
            "there is nothing to predict"
        )
    return float(-np.mean(log_p[np.concatenate(targets)]))


def predicted_tokens(batch: Batch) -> np.ndarray:
    """The tokens of a batch that a model is asked to predict, a vector."""
    tokens_BS, segment_ids_BS = np.asarray(batch["tokens"]), np.asarray(batch["segment_ids"])
    follows = (segment_ids_BS[:, 1:] == segment_ids_BS[:, :-1]) & (segment_ids_BS[:, 1:] > 0)
    if "loss_mask" in batch:
        follows &= np.asarray(batch["loss_mask"])[:, 1:] > 0
    return tokens_BS[:, 1:][follows]


# ---- checks ----------------------------------------------------------------------------------


def _check_sizes(
    tokenizer: Tokenizer, seq_len: int, batch_size: int, vocab_size: int, rows: Sequence[int] | None
) -> list[int]:
    """The row numbers, all rows for None, after checks of every size."""
    if seq_len < 2:
        raise ValueError(
            f"seq_len: got {seq_len}; must be at least 2, a token and the one it predicts"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}; must be at least 1")
    rows = list(range(batch_size)) if rows is None else list(rows)
    if not rows or sorted(set(rows)) != rows or rows[0] < 0 or rows[-1] >= batch_size:
        raise ValueError(
            f"rows: got {rows}; must be one or more rows of the batch, in [0, {batch_size}), "
            "ascending"
        )
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"vocab_size: got {vocab_size}; the tokenizer has ids up to "
            f"{tokenizer.vocab_size - 1}, so it must be at least {tokenizer.vocab_size}"
        )
    return rows
