"""Prints results: one JSON object, lines of names and values, or a table.

Next file to read: v4jax/checkpoint/atomic.py.
"""

from collections.abc import Iterable, Sequence


def print_result(result: dict, as_json: bool) -> None:
    """Prints names and values, or one JSON object."""
    if as_json:
        from v4jax.checkpoint.atomic import json_text

        print(json_text(result))
        return
    for name, value in result.items():
        print(f"{name}: {value}")


def print_rows(rows: Iterable[Sequence]) -> None:
    """Prints a table whose rows are equally long."""
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    table = Table(show_header=False, box=None)
    for _ in rows[0]:
        table.add_column(overflow="fold")  # whole names, even on a narrow terminal
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)
