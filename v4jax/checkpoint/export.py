"""Writes the parameter tree as a Hugging Face style directory: official names, config.json, safetensors in pieces.

The directory appears whole or not at all: everything is written beside it and renamed at the end. Of several processes
all take part, as each holds only its shards, and the first one writes.

Next file to read: v4jax/checkpoint/names.py.
"""

import json
import math
import pathlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sharding.processes import gather, is_first
from v4jax.checkpoint.load import INDEX_FILE
from v4jax.checkpoint.names import (
    check_table,
    check_tree,
    file_dtype,
    official_names,
    official_shapes,
    plain_dtype,
    read_slot,
)
from v4jax.config import ModelConfig


def save_safetensors(
    cfg: ModelConfig,
    params: Mapping[str, Any],
    directory,
    dtype: Any = "bfloat16",
    max_file_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes `params` (NumPy or JAX arrays) to `directory` in the official format, which transformers opens too.

    Args:
      dtype: "float32" or "bfloat16", of every *.weight; hc_*, attn_sink, ape and gate.bias stay float32, tid2eid int64.
      max_file_bytes: tensor bytes per file (a larger tensor gets its own); one file's tensors are in memory at a time.
      overwrite: replace an earlier export; other files beside it (a tokenizer) stay, a directory in it is refused.

    Raises:
      ValueError: a directory that may not be replaced, another dtype, or a tree that is not one of `cfg`.
    """
    dtype = plain_dtype(dtype)
    if isinstance(max_file_bytes, bool) or not isinstance(max_file_bytes, int) or max_file_bytes < 1:
        raise ValueError(f"max_file_bytes: got {max_file_bytes!r}; must be a positive integer")
    target = pathlib.Path(directory).resolve()
    _check_target(target, overwrite)
    leaves = check_tree(cfg, params)
    files = _tensor_files(cfg, leaves, dtype, max_file_bytes)
    if not is_first():
        for _ in files:  # hands over the shards that live here
            pass
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir()
    try:
        _write_tensors(files, partial)
        _write_json(partial / "config.json", cfg.to_dict() | {"torch_dtype": dtype.name})
        for path in target.iterdir() if target.exists() else ():
            if not _is_ours(path):
                shutil.copy2(path, partial)
        _replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tensor_files(cfg: ModelConfig, leaves, dtype: np.dtype, max_file_bytes: int) -> Iterator[tuple[str, dict]]:
    """(file name, its tensors) of files of at most `max_file_bytes`; the tensors of one file are held at a time.

    Every process must go through all of it; only the first gets tensors.
    """
    slots = official_names(cfg)
    sizes = {
        name: math.prod(shape) * file_dtype(name, dtype).itemsize for name, shape in official_shapes(cfg).items()
    }
    pieces = _split(sizes, max_file_bytes)
    for i, names in enumerate(pieces, start=1):
        tensors = {}
        for name in names:
            leaf = gather(leaves[slots[name].path], slots[name].index)
            if is_first():
                tensors[name] = read_slot(name, leaf, slots[name]._replace(index=()), file_dtype(name, dtype))
                if name.endswith(".tid2eid"):
                    check_table(cfg, name, tensors[name])
        yield ("model.safetensors" if len(pieces) == 1 else f"model-{i:05}-of-{len(pieces):05}.safetensors"), tensors
        tensors.clear()


def _write_tensors(files: Iterator[tuple[str, dict]], directory: pathlib.Path) -> None:
    """The files and, if there are several, their index."""
    weight_map, total = {}, 0
    for file, tensors in files:
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(set(weight_map.values())) > 1:
        _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into pieces of at most `limit` bytes; {"a": 3, "b": 3, "c": 9}, 6 -> [[a, b], [c]]."""
    pieces: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if pieces[-1] and size > room:
            pieces.append([])
            room = limit
        pieces[-1].append(name)
        room -= size
    return pieces


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _check_target(target: pathlib.Path, overwrite: bool) -> None:
    """Refuses to replace what is not empty or, with `overwrite`, holds directories: no export looks so."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target}: is a file; must be a directory, new or empty")
    found = sorted(target.iterdir())
    if found and not overwrite:
        raise ValueError(f"{target}: not empty; give a new directory, or overwrite=True to replace an earlier export")
    for path in found:
        if not path.is_file():
            raise ValueError(f"{target}: holds the directory {path.name}; overwrite replaces an earlier export only")


def _is_ours(path: pathlib.Path) -> bool:
    return path.name in ("config.json", INDEX_FILE) or path.suffix == ".safetensors"


def _replace(partial: pathlib.Path, target: pathlib.Path) -> None:
    """Renames `partial` to `target`; what stood there goes only once the new one is in place."""
    old = partial.with_suffix(".old")
    if target.exists():
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
