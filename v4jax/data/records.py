"""Records of files: lines of JSON, rows of Parquet, records of ArrayRecord.

Next file to read: v4jax/data/checks.py.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import grain

from v4jax.data.config import Source
from v4jax.data.documents import found_files

_SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson"), "chat": (".jsonl", ".ndjson"), "parquet": (".parquet",),
    "arrayrecord": (".array_record", ".arrayrecord"),
}  # fmt: skip


def record_files(source: Source) -> list[pathlib.Path]:
    """The file that the source names, or those of its folder with the format's suffix, sorted.

    Raises:
      ValueError: there is none.
    """
    root = pathlib.Path(source.path).expanduser()
    if root.is_file():
        return [root]
    suffixes = _SUFFIXES[source.format]
    files = sorted(path for path in found_files(root, source.glob) if path.suffix in suffixes) if root.is_dir() else []
    if not files:
        raise ValueError(f"source: {root} is no file and holds none matching {source.glob!r} with suffix {' or '.join(suffixes)}")
    return files


def read_records(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and place, record as a dict) of every record, in order of file and place. Records hold source.column.

    Raises:
      ValueError: a file that is not of the format, or a record without the column; names file and place.
    """
    readers = {"jsonl": _lines, "chat": _lines, "parquet": _rows, "arrayrecord": _array_records}
    for path in record_files(source):
        for place, record in readers[source.format](path, source.column):
            if source.column and source.column not in record:
                raise ValueError(f"{path}:{place}: has no column {source.column!r}; there are: {', '.join(sorted(record))}")
            yield f"{path}:{place}", record


def read_texts(source: Source) -> Iterator[tuple[str, str]]:
    """(file and place, text) of every record that holds text.

    Raises:
      ValueError: as read_records does, or a column that is not text.
    """
    for place, record in read_records(source):
        text = record[source.column]
        if not isinstance(text, str):
            raise ValueError(f"{place}: column {source.column!r} is {type(text).__name__}; must be text")
        if text:
            yield place, text


def _lines(path: pathlib.Path, _) -> Iterator[tuple[int, dict]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _object(path, number, line)


def _object(path: pathlib.Path, place: int, data: bytes) -> dict:
    try:
        record = json.loads(data.decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise ValueError(f"{path}:{place}: not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}:{place}: got {type(record).__name__}; must be a JSON object")
    return record


def _rows(path: pathlib.Path, column: str) -> Iterator[tuple[int, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading Parquet needs the package pyarrow; pip install 'v4jax[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [column] if column in names else names  # without the column, a row shows which there are
            place = 0
            for batch in file.iter_batches(columns=wanted):
                for record in batch.to_pylist():
                    place += 1
                    yield place, record
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a Parquet file: {' '.join(str(error).split())}") from None


def _array_records(path: pathlib.Path, column: str) -> Iterator[tuple[int, dict]]:
    try:
        records = grain.sources.ArrayRecordDataSource([str(path)])
        count = len(records)
    except Exception as error:  # the reader raises bare Exception subclasses of its own for every fault
        raise ValueError(f"{path}: not an ArrayRecord file: {' '.join(str(error).split())}") from None
    for index in range(count):
        if column:
            yield index, _object(path, index, records[index])
        else:
            yield index, {"": _utf8(path, index, records[index])}


def _utf8(path: pathlib.Path, place: int, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{place}: not UTF-8 text: {error.reason}") from None
