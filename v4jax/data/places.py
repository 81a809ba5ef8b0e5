"""Names the place in the data that an error comes from.

Next file to read: v4jax/data/compressed.py.
"""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def at(place: str) -> Iterator[None]:
    """Puts a place in front of any error that the block finds in the data there, on one line.

    Bad data raise ValueError, or RecursionError if they are nested too deep. Every other error is a
    fault of the program or the machine; it keeps its type, and a note on its traceback names the
    place.
    """
    try:
        yield
    except (ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{place}: {kind}{said}") from error
    except Exception as error:
        error.add_note(f"v4jax: the data at {place} led to this")
        raise
