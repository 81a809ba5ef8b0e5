"""What a stream of batches depends on: a run must not go on with other data in silence.

Files go by size and a checksum of samples of their content: reading all of a corpus takes hours.
Their names count relative to the source, so a corpus may lie elsewhere when a run goes on.

Next file to read: v4jax/data/pieces.py.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
from typing import Any, NamedTuple

from v4jax.data.config import DataConfig, Source
from v4jax.data.files import at, find_files
from v4jax.tokenizer import Tokenizer

_SAMPLE_BYTES = 64 * 2**10
_READERS = 16
_LISTED = 1000
"""Up to so many files of a source are noted one by one, so that a difference can be named."""

_BEFORE = {"packing": "split"}
"""What older checkpoints leave out where it was so."""

_NONE = "no such file"


class Difference(NamedTuple):
    """A setting or file that is not as it was."""

    name: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"was saved with {self.name} {self.was}, this run has {self.now}"


def settings_of(
    cfg: DataConfig, tokenizer: Tokenizer, seq_len: int, batch_size: int
) -> dict[str, Any]:
    """What batches depend on, in configuration and files: JSON values in the order to name them."""
    talks = any(source.format == "chat" for source in cfg.sources)
    chat = dataclasses.asdict(cfg.chat) if talks else {}
    return {
        "tokenizer": f"{type(tokenizer).__name__} of {tokenizer.vocab_size}",
        "tokenizer content": tokenizer.fingerprint,
        "seed": cfg.seed,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "packing": cfg.packing,
        "weights": [source.weight for source in cfg.sources],
        "formats": [source.format for source in cfg.sources],
        "columns": [source.column for source in cfg.sources if source.format != "text"],
        "held_out": cfg.held_out,
        "fim_rate": cfg.fim_rate,
        "masked": cfg.masked,
        **{f"chat.{name}": value for name, value in chat.items()},
        "files": [file_marks(source) for source in cfg.sources],
        "evaluate_on": {source.label: _evaluated(source) for source in cfg.evaluate_on},
    }


def file_marks(source: Source) -> dict[str, Any]:
    """A source's files: how many, a digest of names, sizes and samples, and each one if few."""
    files = sorted(find_files(source).files)
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        marks = pool.map(_mark, [path for _, path in files])
        listed = {name: mark for (name, _), mark in zip(files, marks, strict=True)}
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
    listed = listed if len(files) <= _LISTED else {}
    return {"label": source.label, "count": len(files), "digest": digest, "listed": listed}


def differences(saved: dict[str, Any], ours: dict[str, Any]) -> list[Difference]:
    """What training data differ in, by two results of `settings_of`; the first may be older."""
    saved = _BEFORE | saved
    found = []
    for name, now in ours.items():
        if name == "evaluate_on" or name not in saved:
            continue
        if name == "files":
            pairs = zip(saved[name], now, strict=False)
            found += [one for was, is_now in pairs for one in _file_differences(was, is_now)]
        elif saved[name] != now:
            found.append(Difference(name, saved[name], now))
    return found


def evaluation_differences(saved: dict[str, Any], ours: dict[str, Any]) -> list[Difference]:
    """Sets to evaluate on that took the name of another one: their losses cannot be compared.

    One that is added or left out is no difference.
    """
    found = []
    for label, now in ours["evaluate_on"].items():
        was = saved.get("evaluate_on", {}).get(label, now)
        for name in ("format", "column"):
            if was[name] != now[name]:
                found.append(Difference(f"evaluate_on {label}: {name}", was[name], now[name]))
        files = _file_differences(was["files"], now["files"])
        found += [one._replace(name=f"evaluate_on {one.name}") for one in files]
    return found


def saved_settings(directory: pathlib.Path) -> dict[str, Any]:
    """The settings in a checkpoint's item of data positions; {} where an older v4jax wrote none.

    Raises:
      ValueError: names the file that is there and cannot be read.
    """
    for path in sorted(directory.glob("*.json"))[:1]:
        try:
            return dict(json.loads(path.read_text()).get("settings") or {})
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"data position: {path} cannot be read ({error}); "
                f"remove {directory.parent} to resume from the checkpoint before it"
            ) from None
    return {}


def _evaluated(source: Source) -> dict[str, Any]:
    return {"format": source.format, "column": source.column, "files": file_marks(source)}


def _file_differences(was: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    if was["digest"] == now["digest"]:
        return []
    before, after, label = was["listed"], now["listed"], now["label"]
    if not before or not after:
        counts = (f"{one['count']} with digest {one['digest']}" for one in (was, now))
        return [Difference(f"files of {label}", *counts)]
    return [
        Difference(
            label if name == "." else f"{label}/{name}",
            before.get(name, _NONE),
            after.get(name, _NONE),
        )
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _mark(path: pathlib.Path) -> str:
    """Size and SHA-256 of the first, the middle and the last 64 KiB."""
    digest = hashlib.sha256()
    with at(str(path)), path.open("rb") as file:
        size = file.seek(0, 2)
        for begin in sorted({0, max(0, (size - _SAMPLE_BYTES) // 2), max(0, size - _SAMPLE_BYTES)}):
            file.seek(begin)
            digest.update(file.read(_SAMPLE_BYTES))
    return f"{size} bytes {digest.hexdigest()[:12]}"
