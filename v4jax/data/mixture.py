"""Several sources as one: mixed by weight without end, or one after another.

Next file to read: v4jax/data/rows.py.
"""

import bisect
import itertools
import sys
from collections.abc import Sequence

import grain
import numpy as np

SLOTS = 1021
"""Pieces in one round of a mixture; each source has a whole number of them.

It is prime, so that a row of a batch, which takes every B-th piece, sees other slots in each round.
"""


def shuffled(
    parts: Sequence, weights: Sequence[float], names: Sequence[str], seed: int
) -> grain.MapDataset:
    """Endless pieces: each source's are shuffled anew each epoch and mixed by weight.

    Tokens of the sources come in the ratio of their weights.

    Args:
      parts: the pieces of each source, with `mean_tokens`.
      weights: each source's share of tokens, relative to the others'; above 0.
      names: of the sources, for the message.

    Raises:
      ValueError: a source so light, or with pieces so long, that a round would have none of them.
    """
    streams = [
        grain.MapDataset.source(part).seed(seed + index).shuffle().repeat()
        for index, part in enumerate(parts)
    ]
    if len(streams) == 1:
        return streams[0]
    share = np.array(
        [weight / part.mean_tokens for weight, part in zip(weights, parts, strict=True)]
    )
    exact = SLOTS * share / share.sum()
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: SLOTS - counts.sum()]] += 1
    if not counts.all():
        light = int(np.argmin(counts))
        raise ValueError(
            f"weight: got {weights[light]} for {names[light]}; "
            f"less than one in {SLOTS} of the pieces would be its, raise it"
        )
    return grain.MapDataset.source(_Rounds(streams, counts, seed))


class _Rounds:
    """Round after round of SLOTS pieces, with the sources in one random order.

    In each round a source goes on where the last round left it.
    """

    def __init__(self, streams: Sequence[grain.MapDataset], counts: np.ndarray, seed: int):
        self._streams, self._counts = streams, counts
        self._source = np.random.default_rng(seed).permutation(
            np.repeat(np.arange(len(counts)), counts)
        )
        self._rank = np.zeros(SLOTS, int)
        for source, count in enumerate(counts):
            self._rank[self._source == source] = np.arange(count)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rounds, slot = divmod(index, SLOTS)
        source = self._source[slot]
        return self._streams[source][int(rounds * self._counts[source] + self._rank[slot])]


class Joined:
    """The pieces of all parts, one after another."""

    def __init__(self, parts: Sequence):
        self._parts = parts
        self._ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        which = bisect.bisect_right(self._ends, index)
        return self._parts[which][index - (self._ends[which - 1] if which else 0)]
