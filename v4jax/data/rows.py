"""Pieces packed into rows, rows stacked into batches, and the position of each row, saved and restored.

Axes: B batch, S query positions.

Next file to read: v4jax/train/data.py.
"""

import json
from collections.abc import Awaitable

import grain
import jax
import numpy as np

from v4jax.data.identity import differences

Batch = dict[str, np.ndarray]
"""tokens int32 [B,S], and segment_ids int32 [B,S]: 1, 2, ... per document of the row, 0 where a row is padded. Of
conversations also loss_mask int32 [B,S]: 1 on the tokens to be learned."""

_LISTS = ("files", "evaluate_on")
"""Settings that grow with the number of files."""

_BINS = 16
"""Rows that best-fit packing fills at a time, for each row of the batch."""


def packed(pieces: grain.MapDataset, seq_len: int, packing: str, masked: bool) -> grain.IterDataset:
    """Rows of seq_len tokens; each row counts its segments from 1, also where it goes on with a piece cut before it.

    packing "split" cuts pieces where a row ends; "best_fit" puts each, whole, into the fullest row that has room.
    """
    # No read-ahead threads: reading a piece takes microseconds, and every row would start 16 of them.
    in_line = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    stream = pieces.to_iter_dataset(in_line)
    lengths = {"tokens": seq_len} | ({"loss_mask": seq_len} if masked else {})
    if packing == "best_fit":
        return grain.experimental.BestFitPackIterDataset(
            stream, length_struct=lengths, num_packing_bins=_BINS
        )
    return grain.experimental.ConcatThenSplitIterDataset(stream, length_struct=lengths)


class StackedRows(grain.IterDataset):
    """Stacks one row of each parent into a batch; `numbers` are their places in the global batch."""

    def __init__(self, rows: list[grain.IterDataset], numbers: list[int], settings: dict):
        super().__init__(rows)
        self._numbers, self._settings = numbers, settings

    def __iter__(self) -> grain.DatasetIterator:
        return _StackedRowsIterator(
            [iter(row) for row in self._parents], self._numbers, self._settings
        )


class _StackedRowsIterator(grain.DatasetIterator):
    def __init__(self, rows: list[grain.DatasetIterator], numbers: list[int], settings: dict):
        super().__init__(rows)
        self._numbers, self._settings = numbers, settings

    def __next__(self) -> Batch:
        return stack([next(row) for row in self._parents])

    def get_state(self) -> dict:
        """Small and free of arrays, so that JSON keeps it. Rows go by their number in the global batch."""
        rows = {
            str(number): row.get_state()
            for number, row in zip(self._numbers, self._parents, strict=True)
        }
        return {"settings": self._settings, "rows": rows}

    def set_state(self, state: dict) -> None:
        for difference in differences(state["settings"], self._settings):
            raise ValueError(f"data position: {difference}; only the same can go on")
        for number, row in zip(self._numbers, self._parents, strict=True):
            if str(number) not in state["rows"]:
                raise ValueError(
                    f"data position: has no row {number}; a file of the checkpoint is missing"
                )
            saved = state["rows"][str(number)]
            if "remainder_slices" in saved:
                # Orbax keeps the state as JSON, which makes lists of tuples. grain 0.2.18 compares these slices with a
                # tuple, takes an empty remainder for a real one, and silently drops a whole document.
                saved = saved | {
                    "remainder_slices": {
                        name: tuple(ends) for name, ends in saved["remainder_slices"].items()
                    }
                }
            row.set_state(saved)

    # Orbax calls these two. grain's own would want one file per process again, from the same number of processes.

    async def save(self, directory) -> Awaitable[None]:
        """Writes this process's rows, as they are now, to a file of its own; in the background."""
        state = self.get_state()
        if jax.process_index():  # the first process's file is the one that is compared
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
                    f"data position: {directory} has none, or one of an older v4jax; use a new run directory"
                )
            rows = {number: row for state in states for number, row in state["rows"].items()}
            self.set_state({"settings": states[0]["settings"], "rows": rows})

        return read()


def stack(rows: list[dict[str, np.ndarray]]) -> Batch:
    """Packed rows as a batch."""
    names = {"tokens": "tokens", "segment_ids": "tokens_segment_ids", "loss_mask": "loss_mask"}
    return {
        name: np.stack([row[key] for row in rows]) for name, key in names.items() if key in rows[0]
    }
