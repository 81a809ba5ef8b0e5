"""Proves that a checkpoint's files are still what was written, by a checksum of each beside them.

Orbax does not notice a flipped byte or a file cut short by a full disk. A checkpoint without
checksums proves nothing: its process was killed between Orbax's last rename and the last checksum,
somebody else wrote it, or the checksums were lost. It counts as damaged as long as an older
checkpoint is proven, since a run repeats those steps bit for bit. It is used, with a warning, only
where there is no other.

Next file to read: v4jax/checkpoint/json_item.py.
"""

import concurrent.futures
import json
import pathlib
from collections.abc import Mapping, Sequence

from v4jax.checkpoint.atomic import write_text
from v4jax.checkpoint.disk import crc_of

SUMS_FILE = "checksums.json"
"""With several processes, each writes its share: checksums-0-of-2.json and so on."""
NOT_NOTED = "it has no checksums, so nothing proves it whole"
_READERS = 4


def write_sums(
    directory: pathlib.Path,
    turn: int = 0,
    turns: int = 1,
    known: Mapping[pathlib.Path, tuple[int, int]] | None = None,
) -> None:
    """Writes size and CRC-32 of every `turns`-th file below `directory`, from number `turn` on.

    Args:
      directory: a complete checkpoint.
      known: size and CRC-32 of files that need not be read again.
    """
    known = known or {}
    # Another process may be writing its share at this moment (atomic.py: a .tmp, then renamed). It
    # is no part of the checkpoint, and all processes must list the same files to agree on their
    # shares.
    files = sorted(
        path
        for path in directory.rglob("*")
        if path.is_file() and not path.name.startswith("checksums")
    )[turn::turns]
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        sums = dict(
            zip(
                (str(path.relative_to(directory)) for path in files),
                pool.map(lambda path: known.get(path) or crc_of(path), files),
                strict=True,
            )
        )
    name = SUMS_FILE if turns == 1 else f"checksums-{turn}-of-{turns}.json"
    write_text(directory / name, json.dumps(sums, indent=0) + "\n")


def damage(
    directory: pathlib.Path,
    items: Sequence[str] | None = None,
    turn: int = 0,
    turns: int = 1,
    once: bool = False,
) -> str | None:
    """Says in words what is wrong with a checkpoint; None if every file is as written.

    NOT_NOTED if there are no checksums, otherwise the first damaged or missing file.

    Args:
      items: subdirectories to look at, such as "params"; None: all.
      turn, turns: looks only at every `turns`-th file from number `turn` on, since processes share
        the work.
      once: the files will not be read again soon (checkpoint/disk.py).
    """
    try:
        sums = _noted(directory)
    except (OSError, ValueError, AttributeError):
        return "its checksums cannot be read"
    if sums is None:
        return NOT_NOTED
    wanted = {
        name: one
        for name, one in sums.items()
        if items is None or pathlib.PurePath(name).parts[0] in items
    }
    wanted = dict(list(wanted.items())[turn::turns])
    missing = [name for name in wanted if not (directory / name).is_file()]
    if missing:
        return f"{missing[0]} is missing"
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        for (name, (size, crc)), (found, found_crc) in zip(
            wanted.items(),
            pool.map(lambda name: crc_of(directory / name, once), wanted),
            strict=True,
        ):
            if found != size:
                return f"{name} has {found} bytes; {size} were written"
            if found_crc != crc:
                return f"{name} holds other bytes than were written"
    return None


def _noted(directory: pathlib.Path) -> dict[str, tuple[int, int]] | None:
    """File -> (size, CRC-32), from the shares of all processes; None if a share is missing."""
    found = {
        path.name: json.loads(path.read_text())
        for path in sorted(directory.iterdir())
        if _is_sums(path)
    }
    parts = {int(name.split("-of-")[1].removesuffix(".json")) for name in found if "-of-" in name}
    if not found or (parts and parts != {len(found)}):
        return None
    return {name: tuple(one) for sums in found.values() for name, one in sums.items()}


def _is_sums(path: pathlib.Path) -> bool:
    return path.name.startswith("checksums") and path.suffix == ".json"
