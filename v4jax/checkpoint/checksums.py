"""Proves that a checkpoint's files are still what was written, by a checksum of each beside them.

Orbax does not notice a flipped byte or a file cut short by a full disk. A checkpoint without
checksums proves nothing: its process was killed between Orbax's last rename and the last checksum,
somebody else wrote it, or the checksums were lost. In a bucket the store's own tags (crc32c, ETag)
take the place of checksums, and one listing compares them. It counts as damaged as long as an older
checkpoint is proven, since a run repeats those steps bit for bit. It is used, with a warning, only
where there is no other.

Next file to read: v4jax/checkpoint/json_item.py.
"""

import concurrent.futures
import json
import pathlib
from collections.abc import Mapping, Sequence

from v4jax import storage
from v4jax.checkpoint.atomic import write_text
from v4jax.checkpoint.disk import crc_of
from v4jax.storage import Entry, Place, Remote

ORIGIN = ""
"""In a bucket's checksums, the name that has the place of the store for its tag."""
SUMS_FILE = "checksums.json"
"""With several processes, each writes its share: checksums-0-of-2.json and so on."""
NOT_NOTED = "it has no checksums, so nothing proves it whole"
_READERS = 4


def write_sums(
    directory: Place,
    turn: int = 0,
    turns: int = 1,
    known: Mapping[pathlib.Path, tuple[int, int]] | None = None,
) -> None:
    """Writes size and CRC-32 of every `turns`-th file below `directory`, from number `turn` on.

    Args:
      directory: a complete checkpoint.
      known: size and CRC-32 of files that need not be read again.
    """
    if isinstance(directory, Remote):
        if turn == 0:  # one listing tells all
            found = storage.listing(directory)
            tags = {name: one for name, one in found.items() if not name.startswith("checksums")}
            tags[ORIGIN] = Entry(0, str(directory))
            write_text(directory / SUMS_FILE, json.dumps(tags, indent=0) + "\n")
        return
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
    directory: Place,
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
    origin = sums.pop(ORIGIN, None)
    wanted = {
        name: one
        for name, one in sums.items()
        if items is None or pathlib.PurePath(name).parts[0] in items
    }
    if isinstance(directory, Remote):
        same_place = origin == (0, str(directory))
        return _damage_listed(wanted, storage.listing(directory), same_place)
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
            if isinstance(crc, int) and found_crc != crc:  # of a bucket's store, sizes are known
                return f"{name} holds other bytes than were written"
    return None


def _damage_listed(
    noted: Mapping[str, tuple[int, int | str]], found: Mapping[str, Entry], same_place: bool
) -> str | None:
    """`damage` of a store in a bucket, by its listing alone.

    A copy made elsewhere has other tags, so only its sizes are compared.
    """
    for name, (size, tag) in noted.items():
        if name not in found:
            return f"{name} is missing"
        if found[name].size != size:
            return f"{name} has {found[name].size} bytes; {size} were written"
        if same_place and found[name].tag != tag:
            return f"{name} holds other bytes than were written"
    return None


def _noted(directory: Place) -> dict[str, tuple[int, int | str]] | None:
    """File -> (size, CRC-32 or tag), of all processes' shares; None if a share is missing."""
    found = {
        path.name: json.loads(path.read_text())
        for path in sorted(directory.iterdir())
        if _is_sums(path)
    }
    parts = {int(name.split("-of-")[1].removesuffix(".json")) for name in found if "-of-" in name}
    if not found or (parts and parts != {len(found)}):
        return None
    return {name: tuple(one) for sums in found.values() for name, one in sums.items()}


def _is_sums(path: Place) -> bool:
    return path.name.startswith("checksums") and path.suffix == ".json"
