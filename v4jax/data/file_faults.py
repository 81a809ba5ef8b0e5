"""Why a file of a source is not read, judged by its name, its size and its first line.

Next file to read: v4jax/data/places.py.
"""

import json
import pathlib
import re
import stat

from v4jax.data.compressed import COMPRESSED, open_data, plain_name, require_zstd
from v4jax.data.config import Source
from v4jax.storage import Place

_LINES = (".jsonl", ".ndjson", ".json")
SUFFIXES = {
    "jsonl": _LINES,
    "chat": _LINES,
    "preference": _LINES,
    "parquet": (".parquet",),
    "arrayrecord": (".array_record", ".arrayrecord"),
}
DOT, EMPTY = "dot name", "empty"
_SHARD = re.compile(r"-\d+-of-\d+$")
_COMPRESSIBLE = ("text", "jsonl", "chat", "preference")
_HEAD_BYTES = 4096
"""More than a compressed file of no bytes takes."""
_JSON_LINE_BYTES = 64 * 2**20


def fault_of(path: pathlib.Path, source: Source) -> str:
    """Why a file is left out; "" for one that is read."""
    try:
        state = path.stat()
    except OSError:  # a link that leads nowhere, or to itself
        return "a link to nothing"
    if not stat.S_ISREG(state.st_mode):
        return "no regular file"
    return fault_in_content(path, state.st_size, source)


def fault_in_content(path: Place, size: int, source: Source) -> str:
    """Why a file of `size` bytes is left out by its name or its beginning; "" if it is read."""
    compressed = source.format in _COMPRESSIBLE and path.suffix.lower() in COMPRESSED
    inner = plain_name(path.name) if compressed else path.name
    suffix = pathlib.PurePath(_SHARD.sub("", inner)).suffix.lower()
    if source.format != "text" and suffix not in SUFFIXES[source.format]:
        return f"suffix {path.suffix!r}" if path.suffix else "no suffix"
    if source.format == "text" and suffix in (".tar", ".tgz"):
        return "an archive: unpack it"
    if compressed and path.suffix.lower() == ".zst":
        require_zstd(path)
    if size == 0 or (compressed and size < _HEAD_BYTES and _is_empty(path)):
        return EMPTY
    if source.format != "text" and suffix == ".json":
        return _json_fault(path, source.columns)
    return ""


def _is_empty(path: Place) -> bool:
    with open_data(path) as file:
        return not file.read(1)


def _json_fault(path: Place, columns: tuple[str, ...]) -> str:
    """Why a .json file is not read; "" if its first line shows that it has JSON lines."""
    with open_data(path) as file:
        line = file.readline(_JSON_LINE_BYTES)
        while line and not line.strip():
            line = file.readline(_JSON_LINE_BYTES)
    if line.lstrip().startswith(b"["):
        return f"a JSON array, not JSON lines: jq -c '.[]' {path.name} makes them"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        return "not JSON lines"
    missing = [column for column in columns if column not in record]
    return f"its first line has no {missing[0]!r}" if missing else ""
