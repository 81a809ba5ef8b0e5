"""A bar on a terminal, for work of known size.

Next file to read: v4jax/convert/compare.py.
"""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def progress(what: str, total: int, bytes_: bool = True) -> Iterator[Callable[[int], None]]:
    """A function that is told how much more is done; the bar goes when the work ends.

    Args:
      bytes_: whether `total` counts bytes.
    """
    columns = (
        TextColumn(what),
        BarColumn(),
        *([DownloadColumn()] if bytes_ else [TextColumn("{task.completed:.0f}/{task.total:.0f}")]),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda size: bar.advance(task, size)
