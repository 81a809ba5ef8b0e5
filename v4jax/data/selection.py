"""Which conversations, or pairs of them, a run uses, and why the others are left out.

A conversation without anything to learn is left out, and so is a pair in which one has nothing: a
step on such rows would only decay the weights. The split does not depend on the length of rows, so
no stage of a run trains on what another one holds out.

Axes: M conversations or pairs.

Next file to read: v4jax/data/pieces.py.
"""

import numpy as np

from v4jax.data.config import DataConfig, Source
from v4jax.data.documents import held_out_of
from v4jax.data.places import at
from v4jax.data.records import place_of
from v4jax.data.tokenised import TokenStore

_ADVICE = {
    "train": "raise seq_len, or lower held_out",
    "held_out": "raise seq_len or held_out",
    "all": "raise seq_len",
}
"""How to make more conversations of a part usable."""


def used_conversations(
    cfg: DataConfig, source: Source, store: TokenStore, seq_len: int, part: str
) -> np.ndarray:
    """Which conversations (or pairs) of a source are used in `part`, bool [M].

    Args:
      part: "train", "held_out" or "all".

    Raises:
      ValueError: one is too long and chat.too_long is "error", or none is left.
    """
    learnable_M, hashes_M = _learnable(source, store), store.hashes[:: _documents(source)]
    left_out = _left_out(cfg, source, store, learnable_M, seq_len)
    chosen_M = learnable_M.copy()
    if part != "all" and learnable_M.any():
        with at(source.path):
            held_M = held_out_of(np.asarray(hashes_M)[learnable_M], cfg.held_out)
        chosen_M[learnable_M] = held_M == (part == "held_out")
    used_M = chosen_M & ~np.any(list(left_out.values()), axis=0)
    if not used_M.any():
        purpose = "to train on" if part == "train" else "to evaluate on"
        why = _counted(left_out, chosen_M | ~learnable_M)
        advice = _ADVICE[part] if learnable_M.any() else "see weight of messages and train_on"
        raise ValueError(
            f"source: no {_noun(source)} of {source.path} is left {purpose}: {why}; {advice}"
        )
    return used_M


def unused_conversations(cfg: DataConfig, source: Source, store: TokenStore, seq_len: int) -> str:
    """Says how many conversations or pairs rows of seq_len tokens leave out or cut, and why.

    It is "" for none.

    Raises:
      ValueError: one is too long and chat.too_long is "error".
    """
    sizes_M = _sizes(source, store)
    left_out = _left_out(cfg, source, store, _learnable(source, store), seq_len)
    gone_M = np.any(list(left_out.values()), axis=0)
    cut = int((sizes_M > seq_len)[~gone_M].sum())
    said = []
    if gone_M.any():
        why = _counted(left_out, gone_M)
        said.append(f"{gone_M.sum()} of {len(gone_M)} {_noun(source)}s are left out ({why})")
    if cut:
        said.append(f"{cut} of {len(gone_M)} conversations are cut to seq_len={seq_len}")
    return ", ".join(said)


def _left_out(
    cfg: DataConfig, source: Source, store: TokenStore, learnable_M: np.ndarray, seq_len: int
) -> dict[str, np.ndarray]:
    """Reason -> which conversations it leaves out, bool [M]; each has at most one reason."""
    sizes_M = _sizes(source, store)
    long_M = learnable_M & (sizes_M > seq_len)
    if cfg.chat.too_long == "error" and long_M.any():
        longest = int(np.argmax(np.where(long_M, sizes_M, 0)))
        raise ValueError(
            f"{place_of(source, longest)}: this {_noun(source)} has {sizes_M[longest]} tokens, and "
            f"a row holds {seq_len}; raise seq_len, or set chat.too_long to drop"
            + ("" if source.paired else " or cut")
        )
    reasons = {"without a token to learn (weight, train_on)": ~learnable_M}
    if cfg.chat.too_long == "drop":
        return reasons | {f"longer than seq_len={seq_len}": long_M}
    if cfg.chat.too_long == "error":
        return reasons
    beyond_M = learnable_M & ~_learned_within(store, np.minimum(sizes_M, seq_len))
    return reasons | {f"without a token to learn once cut to seq_len={seq_len}": beyond_M}


def _counted(left_out: dict[str, np.ndarray], among_M: np.ndarray) -> str:
    """How many conversations among `among_M` each reason leaves out, in words."""
    counts = {reason: int((which_M & among_M).sum()) for reason, which_M in left_out.items()}
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)


def _documents(source: Source) -> int:
    """Documents of the store for each of what is used or left out."""
    return 2 if source.paired else 1


def _noun(source: Source) -> str:
    return "pair" if source.paired else "conversation"


def _sizes(source: Source, store: TokenStore) -> np.ndarray:
    """Tokens of each conversation or pair, [M]."""
    return np.diff(store.ends, prepend=0).reshape(-1, _documents(source)).sum(1)


def _learnable(source: Source, store: TokenStore) -> np.ndarray:
    """Whether something of each conversation, or of both in a pair, is learned, bool [M]."""
    learned = _learned_within(store, np.diff(store.ends, prepend=0))
    return np.all(learned.reshape(-1, _documents(source)), axis=1)


def _learned_within(store: TokenStore, first_M: np.ndarray) -> np.ndarray:
    """Whether any of the first first_M tokens of each conversation is learned, bool [M].

    The very first token has no predecessor and is never learned.
    """
    begins_M = np.concatenate([[0], store.ends[:-1]])
    # reduceat takes the maximum from each bound to the next; every other one is wanted. The last
    # one reaches to the end by itself.
    bounds = np.stack([begins_M + 1, begins_M + first_M], axis=1).ravel()
    bounds = bounds[:-1] if bounds[-1] == len(store.learned) else bounds
    return np.maximum.reduceat(store.learned, bounds)[::2] > 0
