"""Packs pieces into rows and stacks rows into batches; each row's position is saved and restored.

Axes: B batch, S positions.

Next file to read: v4jax/train/data.py.
"""

import json
from collections.abc import Awaitable, Sequence

import grain
import jax
import numpy as np

from v4jax.data.identity import differences

Batch = dict[str, np.ndarray]
"""tokens int32 [B,S]; segment_ids int32 [B,S]; for conversations also loss_mask int32 [B,S].

segment_ids are 1, 2, ... for the documents of a row, and 0 on padding. Of a pair the chosen
conversation has an odd number, and the rejected one comes right after it with the next. loss_mask
is 1 on tokens to be learned.
"""

_LISTS = ("files", "evaluate_on")
"""Settings that grow with the number of files."""

_BINS = 16
"""How many rows best-fit packing fills at a time, for each row of the batch."""


def packed(
    pieces: grain.MapDataset, seq_len: int, packing: str, marks: Sequence[str]
) -> grain.IterDataset:
    """Rows of seq_len tokens, whose segments count from 1.

    A row that begins with the rest of a cut piece counts it as segment 1 too.

    Args:
      packing: "split" cuts pieces where a row ends; "best_fit" puts each piece whole into the
        fullest row with enough space.
      marks: what pieces have for each token beside its id (DataConfig.marks).
    """
    # No read-ahead threads: reading a piece is fast, and every row would start many threads.
    in_line = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    stream = pieces.to_iter_dataset(in_line)
    lengths = dict.fromkeys(("tokens", *marks), seq_len)
    if packing == "best_fit":
        return grain.experimental.BestFitPackIterDataset(
            stream, length_struct=lengths, num_packing_bins=_BINS
        )
    return grain.experimental.ConcatThenSplitIterDataset(stream, length_struct=lengths)


class StackedRows(grain.IterDataset):
    """Stacks one row of each parent into a batch.

    Args:
      numbers: the rows' places in the global batch.
      settings: what the batches depend on (v4jax/data/identity.py).
    """

    def __init__(self, rows: list[grain.IterDataset], numbers: list[int], settings: dict):
        super().__init__(rows)
        self._numbers, self._settings = numbers, settings

    def __iter__(self) -> grain.DatasetIterator:
        return _StackedRowsIterator(
            [iter(row) for row in self._parents], self._numbers, self._settings
        )


class _StackedRowsIterator(grain.DatasetIterator):
    """The batches of StackedRows. Orbax saves and loads their position."""

    def __init__(self, rows: list[grain.DatasetIterator], numbers: list[int], settings: dict):
        super().__init__(rows)
        self._numbers, self._settings = numbers, settings

    def __next__(self) -> Batch:
        return stack([next(row) for row in self._parents])

    def get_state(self) -> dict:
        """The position, small and without arrays, so that JSON can hold it.

        Rows go by their number in the global batch.
        """
        rows = {
            str(number): row.get_state()
            for number, row in zip(self._numbers, self._parents, strict=True)
        }
        return {"settings": self._settings, "rows": rows}

    def set_state(self, state: dict) -> None:
        """Sets the position.

        Raises:
          ValueError: the state belongs to other data, or lacks a row.
        """
        for difference in differences(state["settings"], self._settings):
            raise ValueError(f"data position: {difference}; only the same can go on")
        for number, row in zip(self._numbers, self._parents, strict=True):
            if str(number) not in state["rows"]:
                raise ValueError(
                    f"data position: has no row {number}; a file of the checkpoint is missing"
                )
            saved = state["rows"][str(number)]
            if "remainder_slices" in saved:
                # Orbax keeps the state as JSON, which turns tuples into lists. grain compares
                # these slices with a tuple; given a list, it takes an empty remainder for a real
                # one and silently drops a whole document.
                saved = saved | {
                    "remainder_slices": {
                        name: tuple(ends) for name, ends in saved["remainder_slices"].items()
                    }
                }
            row.set_state(saved)

    # Orbax calls these two. grain's own versions need one file per process, from the same number
    # of processes.

    async def save(self, directory) -> Awaitable[None]:
        """Writes the current position of this process's rows to its own file, in the background."""
        state = self.get_state()
        if jax.process_index():  # only the first process's file is compared
            settings = state["settings"].items()
            state["settings"] = {name: value for name, value in settings if name not in _LISTS}
        name, text = f"process_{jax.process_index()}.json", json.dumps(state)

        async def write():
            (await directory.await_creation() / name).write_text(text)

        return write()

    async def load(self, directory) -> Awaitable[None]:
        """Sets the position from the rows that all processes wrote."""

        async def read():
            states = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
            if not states or isinstance(states[0]["rows"], list):
                raise ValueError(
                    f"data position: {directory} has none, or one of an older v4jax; "
                    "use a new run directory"
                )
            rows = {number: row for state in states for number, row in state["rows"].items()}
            self.set_state({"settings": states[0]["settings"], "rows": rows})

        return read()


def stack(rows: list[dict[str, np.ndarray]]) -> Batch:
    """Packed rows as a batch.

    Example: a pair of 2 + 3 tokens, packed as segment [2 2 2 2 2], is segments [3 3 4 4 4].
    """
    names = {"tokens": "tokens", "segment_ids": "tokens_segment_ids", "loss_mask": "loss_mask"}
    batch = {
        name: np.stack([row[key] for row in rows]) for name, key in names.items() if key in rows[0]
    }
    if "rejected" in rows[0]:
        rejected_BS, pair_BS = np.stack([row["rejected"] for row in rows]), batch["segment_ids"]
        batch["segment_ids"] = np.where(pair_BS > 0, 2 * pair_BS - 1 + rejected_BS, 0)
    return batch
