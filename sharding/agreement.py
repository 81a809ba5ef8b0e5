"""What processes of one job tell each other: that they have come so far, a flag, texts, an error.

"Every process calls it" marks a collective: it waits until all processes have called it.

Next file to read: sharding/process_rows.py.
"""

import contextlib
import zlib
from collections.abc import Iterator

import jax
import numpy as np

from sharding.process_rows import sum_of_bits


def wait_for_all(what: str) -> None:
    """Returns once every process has called it with the same text.

    Raises:
      RuntimeError: another process waits for something else.
    """
    if jax.process_count() > 1:
        said = np.uint32(zlib.crc32(what.encode()))
        total = sum_of_bits(np.array([said]))[0]
        if total != np.uint32((int(said) * jax.process_count()) % 2**32):
            raise RuntimeError(
                f"processes do different things: this one waits for {what!r}, another does not"
            )


def anywhere(flag: bool) -> bool:
    """Whether `flag` is true on any process. Every process calls it."""
    if jax.process_count() == 1:
        return flag
    return bool(
        sum_of_bits(
            np.array(
                [flag and i == jax.process_index() for i in range(jax.process_count())], np.uint8
            )
        ).any()
    )


def gather_text(text: str) -> list[str]:
    """The texts of all processes, process 0 first. Every process calls it."""
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return [text]
    own = np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)
    sizes = np.zeros(count, np.uint32)
    sizes[index] = own.size
    ends = np.cumsum(sum_of_bits(sizes), dtype=np.int64)
    if not ends[-1]:
        return [""] * count
    joined = np.zeros(ends[-1], np.uint8)
    joined[ends[index] - own.size : ends[index]] = own
    parts = np.split(sum_of_bits(joined), ends[:-1])
    return [part.tobytes().decode("utf-8", "surrogateescape") for part in parts]


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Raises in every process a ValueError that any process raises in the block.

    Its text is that of process 0, or else that of the first process that raised one, with the
    number of that process. Every process enters the block. The block calls no other collective,
    which a process that raises would never reach. Any other error ends this process alone, as a
    crash does.

    Raises:
      ValueError: a process raised one in the block.
    """
    if jax.process_count() == 1:
        yield
        return
    fault = None
    try:
        yield
    except ValueError as error:
        fault = error
    texts = gather_text("" if fault is None else str(fault) or repr(fault))
    for index, text in enumerate(texts):
        if text:
            raise ValueError(text if index == 0 else f"process {index}: {text}") from fault
