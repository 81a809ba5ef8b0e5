"""Whether a checkpoint's files are still what was written: a checksum of each, kept beside them.

Orbax does not notice a flipped byte or a file cut short by a full disk.

Next file to read: v4jax/checkpoint/note.py.
"""

import concurrent.futures
import json
import pathlib
import zlib
from collections.abc import Sequence

from v4jax.checkpoint.text import write_text

SUMS_FILE = "checksums.json"
_PIECE = 16 * 2**20
_READERS = 4


def write_sums(directory: pathlib.Path) -> None:
    """Notes size and CRC-32 of every file below `directory`, which must be complete."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != SUMS_FILE)
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        sums = dict(zip((str(path.relative_to(directory)) for path in files), pool.map(_sum, files), strict=True))
    write_text(directory / SUMS_FILE, json.dumps(sums, indent=0) + "\n")


def damage(directory: pathlib.Path, items: Sequence[str] | None = None, turn: int = 0, turns: int = 1) -> str | None:
    """What is wrong with a checkpoint, in words; None if all is as written, or nothing was noted (it was killed just then).

    Args:
      items: subdirectories to look at ("params"); None: everything.
      turn, turns: looks at every `turns`-th file only, from this one on: processes share the work.
    """
    try:
        sums = json.loads((directory / SUMS_FILE).read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return f"{SUMS_FILE} is not JSON"
    wanted = {name: one for name, one in sums.items() if items is None or pathlib.PurePath(name).parts[0] in items}
    wanted = dict(list(wanted.items())[turn::turns])
    missing = [name for name in wanted if not (directory / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        for (name, (size, crc)), (found, found_crc) in zip(wanted.items(), pool.map(lambda name: _sum(directory / name), wanted), strict=True):
            if found != size:
                return f"{name} has {found} bytes; {size} were written"
            if found_crc != crc:
                return f"{name} holds other bytes than were written"
    return None


def _sum(path: pathlib.Path) -> tuple[int, int]:
    size = crc = 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return size, crc
