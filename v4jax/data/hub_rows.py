"""Rows of a data set of the Hugging Face Hub, streamed at one commit.

Next file to read: v4jax/data/checks.py.
"""

import logging
from collections.abc import Iterator
from typing import Any

from v4jax.storage import Remote


def data_set_rows(path: Any, column: str, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, row as a dict) of every row, in the data set's order.

    Args:
      path: the data set at a commit (storage.data_set).
      column: the wanted one; a row has all if there is no such column.
      split: "train", or "subset/train".

    Raises:
      ValueError: no such split or subset, or rows that cannot be read, in the words of `datasets`.
    """
    import datasets  # pyright: ignore[reportMissingImports]

    for noisy in ("datasets", "huggingface_hub"):  # faults end as one line here
        logging.getLogger(noisy).setLevel(logging.ERROR)
    assert isinstance(path, Remote)
    name, _, commit = path.key.removeprefix("datasets/").partition("@")
    subset, _, part = split.rpartition("/")
    number = 0
    try:
        rows = datasets.load_dataset(
            name, subset or None, split=part, revision=commit, streaming=True
        )
        if column in (rows.column_names or ()):
            rows = rows.select_columns([column])  # of Parquet only this one is read
        for row in rows:
            number += 1
            yield number, dict(row)
    except Exception as error:  # it raises those of its readers, of fsspec and its own
        said = " ".join(str(error).split()) or type(error).__name__
        where = f"{path}: after row {number}" if number else f"{path}"
        raise ValueError(f"source: {where}: split {split!r} cannot be read: {said}") from None
