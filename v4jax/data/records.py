"""Records of files, each with its place: lines of JSON, rows of Parquet, records of ArrayRecord.

Next file to read: v4jax/data/hub_rows.py.
"""

import codecs
import contextlib
import functools
import itertools
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import grain

from v4jax import storage
from v4jax.data.checks import each_key_once
from v4jax.data.compressed import open_data
from v4jax.data.config import Source
from v4jax.data.files import Found, find_files, nothing_found
from v4jax.data.hub_rows import data_set_rows
from v4jax.data.places import at
from v4jax.storage import Place, Remote


def record_files(source: Source, found: Found | None = None) -> list[Place]:
    """The file that the source names, or those of its folder with the format's suffix, sorted.

    Args:
      found: the source's files; None: look them up.

    Raises:
      ValueError: there is none.
    """
    found = find_files(source) if found is None else found
    if not found.files:
        raise nothing_found(source, found)
    return [path for _, path in found.files]


def read_records(
    source: Source, found: Found | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and place, record as a dict) of every record, in order; each has source.columns.

    Handle a record within `with at(place):` (v4jax/data/places.py), so that errors name its place.

    Raises:
      ValueError: a file that is not of the format, or a record without the column; names both.
    """
    readers = {name: _lines for name in ("jsonl", "chat", "preference")}
    readers |= {"parquet": _rows, "arrayrecord": _array_records}
    readers["hf"] = functools.partial(data_set_rows, split=source.split)
    for path in record_files(source, found):
        for place, data in readers[source.format](path, source.column):
            with at(f"{path}:{place}"):
                record = _object(data, place, path) if isinstance(data, bytes) else data
                for column in source.columns:
                    if column not in record:
                        there = ", ".join(sorted(record))
                        raise ValueError(f"has no column {column!r}; there are: {there}")
            yield f"{path}:{place}", record


def read_texts(source: Source, found: Found | None = None) -> Iterator[tuple[str, str]]:
    """(file and place, text) of every record; a text may be empty.

    Raises:
      ValueError: what read_records raises, or a column that is not text.
    """
    for place, record in read_records(source, found):
        text = record[source.column]
        if not isinstance(text, str):
            got = "null" if text is None else type(text).__name__
            raise ValueError(f"{place}: column {source.column!r} is {got}; must be text")
        yield place, text


def place_of(source: Source, number: int) -> str:
    """File and place of a record by its number, counted from 0 over all files."""
    place, _ = next(itertools.islice(read_records(source), number, None))
    return place


def _lines(path: Place, _) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of every line that is not blank."""
    with open_data(path) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield number, line


def _object(data: bytes, place: int, path: Place) -> dict:
    """The JSON object in a line or record."""
    if place == 1 and data.startswith(b"PAR1"):
        raise ValueError(
            "a Parquet file; must be JSON lines (datasets.load_dataset(...).to_json writes them)"
        )
    try:
        record = json.loads(_utf8(data), object_pairs_hook=each_key_once)
    except json.JSONDecodeError as error:
        said = _json_fault(error)
        raise ValueError(f"not JSON: {said}{_hint(data, place, path)}") from None
    if not isinstance(record, dict):
        raise ValueError(
            f"got {type(record).__name__}; must be a JSON object{_hint(data, place, path)}"
        )
    return record


def _json_fault(error: json.JSONDecodeError) -> str:
    """What is wrong and at which column; the line too, where the record has several."""
    line = f"line {error.lineno}, " if error.lineno > 1 else ""
    what = error.msg[0].lower() + error.msg[1:].removesuffix(" at")
    return f"{what} at {line}column {error.colno}"


def _hint(data: bytes, place: int, path: Place) -> str:
    """Advice for a file that seems to be one JSON value over several lines, or one array."""
    if place != 1 or not data.lstrip().startswith((b"[", b"{\n", b"{\r")):
        return ""
    query = ".[]" if data.lstrip().startswith(b"[") else "."
    return f"; one object a line is read, and jq -c '{query}' {path.name} makes them"


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: byte {error.start} of it: {error.reason}") from None


def _rows(path: Place, column: str) -> Iterator[tuple[int, dict]]:
    """(row number, row as a dict) of a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path}: reading Parquet needs the package pyarrow; pip install 'v4jax[parquet]'"
        ) from None
    place = 0
    try:
        with storage.reader(path) as opened, pyarrow.parquet.ParquetFile(opened) as file:
            names = file.schema_arrow.names
            # If the column is missing, a row of all columns lets the message name them.
            wanted = [column] if column in names else names
            for batch in file.iter_batches(columns=wanted):
                for index in range(batch.num_rows):
                    place += 1
                    with at(f"{path}:{place}"):
                        record = {
                            name: batch.column(name)[index].as_py() for name in batch.schema.names
                        }
                    yield place, record
    except (pyarrow.ArrowException, OSError) as error:
        where = f"{path}: after row {place}" if place else f"{path}"
        raise ValueError(f"{where}: not a Parquet file: {' '.join(str(error).split())}") from None


def _array_records(path: Place, column: str) -> Iterator[tuple[int, Any]]:
    # The reader raises its own direct subclasses of Exception for every fault.
    """(number, JSON bytes) of each record, or (number, {"": text}) if the record itself is text."""
    with _on_disk(path) as local:
        yield from _records_of(local, path, column)


@contextlib.contextmanager
def _on_disk(path: Place) -> Iterator[pathlib.Path]:
    """The file, or a copy that goes when the context ends: the reader knows no s3://."""
    if not isinstance(path, Remote):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="v4jax-") as folder:
        copy = pathlib.Path(folder) / path.name
        storage.copy(path, copy)
        yield copy


def _records_of(local: pathlib.Path, path: Place, column: str) -> Iterator[tuple[int, Any]]:
    """The records of the file at `local`, which came from `path`."""
    try:
        records = grain.sources.ArrayRecordDataSource([str(local)])
        count = len(records)  # pyright: ignore[reportArgumentType] (a base class has the length)
    except Exception as error:
        raise ValueError(
            f"{path}: not an ArrayRecord file: {' '.join(str(error).split())}"
        ) from None
    for index in range(count):
        try:
            data = records[index]
        except Exception as error:
            raise ValueError(
                f"{path}:{index}: cannot be read: {' '.join(str(error).split())}"
            ) from None
        with at(f"{path}:{index}"):
            record = data if column else {"": _utf8(data)}
        yield index, record
