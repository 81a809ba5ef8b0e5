"""What a run says about its sources, before it reads them and once they are tokens.

Next file to read: v4jax/data/mixture.py.
"""

from collections.abc import Iterable, Sequence

from v4jax.data.config import DataConfig, Source
from v4jax.data.files import unread_files
from v4jax.data.listing import Listings
from v4jax.data.pieces import allows_reading_in_place
from v4jax.data.selection import unused_conversations
from v4jax.data.store import open_store
from v4jax.tokenizer import Tokenizer

_SHOWN = 8


def unread_lines(cfg: DataConfig, listings: Listings) -> list[str]:
    """A line for each source with files that are not read, or are compressed and fill memory."""
    said = {}
    for source in (*cfg.sources, *cfg.evaluate_on):
        listing = listings[source]
        said[source] = [unread_files(source, listing.found)]
        if listing.compressed and allows_reading_in_place(cfg, source):
            said[source].append(
                f"{listing.compressed} of {len(listing.found.files)} file(s) are compressed: "
                "the tokens of all are kept in memory (--data.cache keeps them on disk)"
            )
        if listing.found.entries and not cfg.cache:
            count = len(listing.found.files)
            what = (
                "a data set of the Hub" if source.format == "hf" else f"{count} file(s) of a bucket"
            )
            said[source].append(
                f"{what}: the tokens of all are kept in memory (--data.cache keeps them on disk)"
            )
    return _lines(said)


def unused_lines(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    seq_lens: Iterable[int],
    held_seq_len: int | None,
    listings: Listings,
) -> list[str]:
    """A line for each source with records that are empty, left out, cut or not read whole.

    Args:
      seq_lens: row lengths to train on.
      held_seq_len: row length to evaluate on; None for a run without evaluation.

    Raises:
      ValueError: a conversation is too long and chat.too_long is "error".
    """
    lengths = dict.fromkeys(cfg.sources, sorted(set(seq_lens)))
    if held_seq_len is not None:
        lengths |= dict.fromkeys(cfg.evaluate_on, [held_seq_len])
    said = {}
    for source, wanted in lengths.items():
        if source.format == "text":
            continue
        store = open_store(cfg, source, tokenizer, listings)
        said[source] = [f"{store.empty} record(s) have an empty text"] if store.empty else []
        if store.unread:
            said[source].append(f"keys that are not read: {_some(store.unread)}")
        for seq_len in wanted if source.talks else ():
            unused = unused_conversations(cfg, source, store, seq_len)
            head = f"at seq_len={seq_len}, " if len(wanted) > 1 and unused else ""
            said[source].append(head + unused)
    return _lines(said)


def _some(keys: Sequence[str]) -> str:
    more = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _lines(said: dict[Source, list[str]]) -> list[str]:
    words = {source.title: "; ".join(filter(None, parts)) for source, parts in said.items()}
    return [f"{title}: {text}" for title, text in words.items() if text]
