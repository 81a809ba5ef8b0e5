"""Which conversations of a store are used, and why the others are left out.

A conversation without anything to learn is left out: a step on such rows would only decay the
weights. The split does not depend on the length of rows, so no stage of a run trains on what
another one holds out.

Axes: D conversations.

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
    """Which conversations of a source are used in `part`, bool [D].

    Args:
      part: "train", "held_out" or "all".

    Raises:
      ValueError: one is too long and chat.too_long is "error", or none is left.
    """
    learnable_D = _learned_within(store, _sizes(store))
    left_out = _left_out(cfg, source, store, learnable_D, seq_len)
    chosen_D = learnable_D.copy()
    if part != "all" and learnable_D.any():
        with at(source.path):
            held_D = held_out_of(np.asarray(store.hashes)[learnable_D], cfg.held_out)
        chosen_D[learnable_D] = held_D == (part == "held_out")
    used_D = chosen_D & ~np.any(list(left_out.values()), axis=0)
    if not used_D.any():
        purpose = "to train on" if part == "train" else "to evaluate on"
        why = _counted(left_out, chosen_D | ~learnable_D)
        advice = _ADVICE[part] if learnable_D.any() else "see weight of messages and train_on"
        raise ValueError(
            f"source: no conversation of {source.path} is left {purpose}: {why}; {advice}"
        )
    return used_D


def unused_conversations(cfg: DataConfig, source: Source, store: TokenStore, seq_len: int) -> str:
    """Says how many conversations rows of seq_len tokens leave out or cut, and why; "" for none.

    Raises:
      ValueError: one is too long and chat.too_long is "error".
    """
    sizes_D = _sizes(store)
    left_out = _left_out(cfg, source, store, _learned_within(store, sizes_D), seq_len)
    gone_D = np.any(list(left_out.values()), axis=0)
    cut = int((sizes_D > seq_len)[~gone_D].sum())
    said = []
    if gone_D.any():
        why = _counted(left_out, gone_D)
        said.append(f"{gone_D.sum()} of {len(gone_D)} conversations are left out ({why})")
    if cut:
        said.append(f"{cut} of {len(gone_D)} conversations are cut to seq_len={seq_len}")
    return ", ".join(said)


def _left_out(
    cfg: DataConfig, source: Source, store: TokenStore, learnable_D: np.ndarray, seq_len: int
) -> dict[str, np.ndarray]:
    """Reason -> which conversations it leaves out, bool [D]; each has at most one reason."""
    sizes_D = _sizes(store)
    long_D = learnable_D & (sizes_D > seq_len)
    if cfg.chat.too_long == "error" and long_D.any():
        longest = int(np.argmax(np.where(long_D, sizes_D, 0)))
        raise ValueError(
            f"{place_of(source, longest)}: this conversation has {sizes_D[longest]} tokens, and a "
            f"row holds {seq_len}; raise seq_len, or set chat.too_long to drop or cut"
        )
    reasons = {"without a token to learn (weight, train_on)": ~learnable_D}
    if cfg.chat.too_long == "drop":
        return reasons | {f"longer than seq_len={seq_len}": long_D}
    beyond_D = learnable_D & ~_learned_within(store, np.minimum(sizes_D, seq_len))
    return reasons | {f"without a token to learn once cut to seq_len={seq_len}": beyond_D}


def _counted(left_out: dict[str, np.ndarray], among_D: np.ndarray) -> str:
    """How many conversations among `among_D` each reason leaves out, in words."""
    counts = {reason: int((which_D & among_D).sum()) for reason, which_D in left_out.items()}
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)


def _sizes(store: TokenStore) -> np.ndarray:
    """Tokens of each conversation, [D]."""
    return np.diff(store.ends, prepend=0)


def _learned_within(store: TokenStore, first_D: np.ndarray) -> np.ndarray:
    """Whether any of the first first_D tokens of each conversation is learned, bool [D].

    The very first token has no predecessor and is never learned.
    """
    begins_D = np.concatenate([[0], store.ends[:-1]])
    # reduceat takes the maximum from each bound to the next; every other one is wanted. The last
    # one reaches to the end by itself.
    bounds = np.stack([begins_D + 1, begins_D + first_D], axis=1).ravel()
    bounds = bounds[:-1] if bounds[-1] == len(store.learned) else bounds
    return np.maximum.reduceat(store.learned, bounds)[::2] > 0
