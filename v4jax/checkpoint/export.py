"""Writes a Hugging Face style directory: config.json and safetensors with official names.

The directory appears whole or not at all: everything is written beside it and renamed at the end.
All processes take part, since each holds only its own shards; the first one writes.

Next file to read: v4jax/checkpoint/checksums.py.
"""

import collections
import concurrent.futures
import contextlib
import json
import math
import pathlib
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from sharding.processes import gather, is_first
from v4jax.checkpoint.files import INDEX_FILE, write_file
from v4jax.checkpoint.formats import (
    DTYPES,
    Kind,
    Stored,
    check_format,
    encode,
    kind_in,
    quantization_config,
    shapes_of,
)
from v4jax.checkpoint.memory_budget import MemoryBudget
from v4jax.checkpoint.names import (
    check_table,
    check_tree,
    official_names,
    official_shapes,
    read_slot,
)
from v4jax.config import ModelConfig
from v4jax.config.json_styles import read_config_json
from v4jax.generation_config import end_tokens
from v4jax.parameter_tree import spec_named
from v4jax.storage import folder_to_fill, local_path
from v4jax.untrusted import file_in

MAX_FILE_BYTES = 5 * 10**9
BUDGET = 10**9
"""Bytes that all workers of a conversion use for small tensors. A larger tensor runs alone."""
_CARRIED = re.compile(
    r"(tokenizer|generation_config|special_tokens_map|chat_template|vocab|merges|added_tokens)"
    r"[\w.]*\.(json|txt|model|jinja)$"
)
"""Files that an export copies from the source checkpoint."""
Files = dict[str, dict[str, tuple[str, tuple[int, ...]]]]
"""File name -> its tensors, scales included -> (dtype, shape)."""


def save_safetensors(
    cfg: ModelConfig,
    params: Mapping[str, Any],
    directory,
    dtype: Any = "bfloat16",
    max_file_bytes: int = MAX_FILE_BYTES,
    overwrite: bool = False,
    source: Any = None,
) -> None:
    """Writes `params` (NumPy or JAX arrays) to `directory` in the official format.

    transformers opens the result too.

    Args:
      dtype: precision of every *.weight. "float32" or "bfloat16"; "official": fp8 matrices and
        MXFP4 experts, as in instruct releases; "fp8": experts in fp8 too, as in -Base releases.
        hc_*, attn_sink, ape and gate.bias stay float32, tid2eid int64.
      max_file_bytes: tensor bytes per file. A larger tensor gets its own file. One tensor is in
        memory at a time.
      overwrite: replace an earlier export. Other files in it, such as a tokenizer, stay; a
        subdirectory is refused.
      source: the checkpoint that the weights come from, if any. Its config.json, if it describes
        this model, is the base of the new one; its tokenizer, generation_config and similar files
        are copied.

    Raises:
      ValueError: a directory that may not be replaced, another dtype, or a tree that does not fit
        `cfg`.
    """
    kinds = kinds_for(cfg, check_format(dtype))
    if (
        isinstance(max_file_bytes, bool)
        or not isinstance(max_file_bytes, int)
        or max_file_bytes < 1
    ):
        raise ValueError(f"max_file_bytes: got {max_file_bytes!r}; must be a positive integer")
    target = local_path(directory, "directory").resolve()
    _check_target(target, overwrite)
    folder_to_fill(target.parent, "directory")
    raw, carried, elsewhere = None, [], []
    if source is not None:
        source = local_path(source, "source")
        raw, carried = read_config_json(source / "config.json"), carried_files(source)
        elsewhere = end_tokens(source, cfg.vocab_size)
    leaves, slots = check_tree(cfg, params), official_names(cfg)

    def stored(name: str) -> Stored | None:
        leaf = gather(leaves[slots[name].path], slots[name].index)
        return (
            store_slot(cfg, name, kinds[name], leaf, slots[name]._replace(index=()))
            if is_first()
            else None
        )

    if not is_first():
        for name in slots:  # every process takes part in gathering its shards
            stored(name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir()
    try:
        write_tensors(partial, plan_files(cfg, kinds, max_file_bytes), stored)
        write_json(partial / "config.json", config_json(cfg, check_format(dtype), raw, elsewhere))
        for path in target.iterdir() if target.exists() else ():
            if not _is_ours(path):
                shutil.copy2(path, partial)
        for path in carried:
            shutil.copyfile(path, partial / path.name)
        replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def store_slot(
    cfg: ModelConfig, name: str, kind: Kind, leaf: Any, slot, scale: np.ndarray | None = None
) -> Stored:
    """Takes one official tensor out of a leaf of the tree, in the form that its file stores.

    Raises:
      ValueError: naming the tensor: ids of experts that do not exist, or numbers that low precision
        cannot hold.
    """
    array = read_slot(name, leaf, slot)
    if spec_named(name).precision == "int64":
        check_table(cfg, name, array)
    try:
        return encode(kind, array, scale)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def kinds_for(cfg: ModelConfig, format: str) -> dict[str, Kind]:
    """Official name -> how a checkpoint in `format` stores the tensor.

    Raises:
      ValueError: a matrix that the format cannot hold.
    """
    kinds = {}
    for name, shape in official_shapes(cfg).items():
        kinds[name] = kind_in(format, name)
        try:
            shapes_of(kinds[name], shape)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return kinds


def config_json(
    cfg: ModelConfig,
    format: str,
    raw: Mapping[str, Any] | None = None,
    elsewhere: Collection[int] = (),
) -> dict[str, Any]:
    """The config.json of an export.

    It is the source's, if that is of official style and describes this model, with only what the
    precision changes replaced. Rows end where they end in the source, and where `cfg` says.

    Args:
      raw: the source's config.json.
      elsewhere: end tokens that the export's generation_config.json has, so config.json need not
        repeat them.
    """
    theirs = None
    if raw is not None and raw.get("model_type") == "deepseek_v4":
        theirs = ModelConfig.from_dict(dict(raw))
    # Not ==: a special token that only one of them has does not make another model. It is kept.
    same = theirs is not None and cfg.difference(theirs) is None
    both = _with_both_tokens(cfg, theirs) if same else cfg
    if same and "compress_ratios" in raw and "layer_types" not in raw:
        found = dict(raw)
        if set(both.eos_token_ids) - set(theirs.eos_token_ids) - set(elsewhere):
            found["eos_token_id"] = list(both.eos_token_ids)
        if both.bos_token_id != theirs.bos_token_id:
            found["bos_token_id"] = both.bos_token_id
    else:
        found = both.to_dict()
    low = quantization_config(format)
    for name in ("quantization_config", "expert_dtype"):
        if name not in low:
            found.pop(name, None)
    found |= {name: value for name, value in low.items() if name not in found}
    return found | {
        "dtype" if "dtype" in found else "torch_dtype": "float32"
        if format == "float32"
        else "bfloat16"
    }


def _with_both_tokens(cfg: ModelConfig, theirs: ModelConfig) -> ModelConfig:
    """The source's config, with end tokens of `cfg` added, and its bos if the source has none."""
    begin = cfg.bos_token_id if theirs.bos_token_id is None else theirs.bos_token_id
    return theirs.replace(bos_token_id=begin).ending_at(cfg.eos_token_ids)


def carried_files(directory) -> list[pathlib.Path]:
    """The files that an export copies: tokenizer, generation_config and similar ones.

    Raises:
      ValueError: one of them is not a regular file of the directory.
    """
    directory = local_path(directory, "directory")
    names = sorted(path.name for path in directory.iterdir() if _CARRIED.match(path.name))
    try:
        return [file_in(directory, name) for name in names]
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{directory}: {error}") from None


# ---- tensors -------------------------------------------------------------------------------------


def plan_files(
    cfg: ModelConfig, kinds: Mapping[str, Kind], max_file_bytes: int = MAX_FILE_BYTES
) -> Files:
    """File name -> its tensors: all in order, cut into files of at most `max_file_bytes`."""
    tensors: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for name, shape in official_shapes(cfg).items():
        data, scale = shapes_of(kinds[name], shape)
        tensors[name] = {name: (kinds[name].dtype, data)}
        if scale is not None:
            tensors[name][scale_name(name)] = (kinds[name].scale, scale)
    sizes = {name: sum(_size(*one) for one in parts.values()) for name, parts in tensors.items()}
    pieces = split(sizes, max_file_bytes)
    files = {}
    for i, names in enumerate(pieces, start=1):
        file = (
            "model.safetensors"
            if len(pieces) == 1
            else f"model-{i:05}-of-{len(pieces):05}.safetensors"
        )
        files[file] = {part: one for name in names for part, one in tensors[name].items()}
    return files


def working_bytes(shape: tuple[int, ...], before: Kind, after: Kind) -> int:
    """Bytes of memory that the conversion of one tensor takes.

    The tensor is held as it was and as it becomes; with low precision also as float32 and
    transposed.
    """
    low = before.scale is not None or after.scale is not None
    return math.prod(shape) * (
        12 if low else DTYPES[before.dtype].itemsize + DTYPES[after.dtype].itemsize
    )


def total_bytes(files: Files) -> int:
    """Bytes of all tensors of a plan."""
    return sum(_size(*one) for tensors in files.values() for one in tensors.values())


def write_tensors(
    directory: pathlib.Path,
    files: Files,
    stored: Callable[[str], Stored],
    wrote: Callable[[int], None] = lambda size: None,
    workers: int = 1,
    memory_for: Callable[[str], int] = lambda name: 0,
) -> None:
    """Writes the files of a plan and, if there are several, their index.

    A file that exists already is taken to be whole.

    Args:
      stored: official name -> its tensor.
      wrote: called with the bytes of each piece written or found.
      workers: files written at once.
      memory_for: official name -> bytes of memory it takes, which the workers share.
    """
    budget = MemoryBudget(BUDGET)

    def held(name: str) -> tuple[Stored, Callable[[], None]]:
        """A tensor, and a function that gives its memory back."""
        with contextlib.ExitStack() as hold:
            hold.enter_context(budget.take(memory_for(name)))
            return stored(name), hold.pop_all().close

    def write(file: str, tensors) -> None:
        if (directory / file).exists():
            wrote(total_bytes({file: tensors}))
            return
        names = [name for name in tensors if not _is_scale(name, tensors)]
        made = (held(name) for name in names) if workers == 1 else _ahead(held, names)
        # Closing both gives memory back after a failure, for which others may wait.
        with contextlib.closing(made), contextlib.closing(_parts(names, made)) as parts:
            write_file(directory / file, tensors, parts, wrote)

    if workers == 1:
        for file, tensors in files.items():
            write(file, tensors)
    else:
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            running = [pool.submit(write, file, tensors) for file, tensors in files.items()]
            try:
                for one in concurrent.futures.as_completed(running):
                    one.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    if len(files) > 1:
        weight_map = {name: file for file, tensors in files.items() for name in tensors}
        write_json(
            directory / INDEX_FILE,
            {"metadata": {"total_size": total_bytes(files)}, "weight_map": weight_map},
        )


def _ahead(held: Callable, names: list[str]) -> Iterator[tuple[Stored, Callable[[], None]]]:
    """map(held, names), with the next one made in a thread while one is in use."""
    coming = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            for i in range(len(names)):
                coming.extend(pool.submit(held, name) for name in names[i + len(coming) : i + 2])
                yield coming.popleft().result()
        finally:
            for one in coming:
                if not one.cancel() and one.exception() is None:
                    one.result()[1]()


def _parts(
    names: list[str], made: Iterator[tuple[Stored, Callable[[], None]]]
) -> Iterator[tuple[str, np.ndarray]]:
    for name in names:
        tensor, done = next(made)
        try:
            yield name, tensor.data
            if tensor.scale is not None:
                yield scale_name(name), tensor.scale
        finally:
            del tensor  # before the next one is read
            done()


def scale_name(name: str) -> str:
    """layers.0.attn.wkv.weight -> layers.0.attn.wkv.scale."""
    return name.removesuffix("weight") + "scale"


def _is_scale(name: str, tensors: Mapping[str, Any]) -> bool:
    return name.endswith(".scale") and name.removesuffix("scale") + "weight" in tensors


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut into pieces of at most `limit` bytes.

    Example: {"a": 3, "b": 3, "c": 9} with limit 6 gives [[a, b], [c]].
    """
    pieces: list[list[str]] = [[]]
    budget = limit
    for name, size in sizes.items():
        if pieces[-1] and size > budget:
            pieces.append([])
            budget = limit
        pieces[-1].append(name)
        budget -= size
    return pieces


# ---- directories ---------------------------------------------------------------------------------


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes indented JSON that ends with a newline."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def _check_target(target: pathlib.Path, overwrite: bool) -> None:
    """Refuses a target that is not empty or, with `overwrite`, one that is no earlier export.

    An export has no subdirectories.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target}: is a file; must be a directory, new or empty")
    found = sorted(target.iterdir())
    if found and not overwrite:
        raise ValueError(
            f"{target}: not empty; give a new directory, or overwrite=True to replace an earlier "
            "export"
        )
    for path in found:
        if not path.is_file():
            raise ValueError(
                f"{target}: holds the directory {path.name}; overwrite replaces an earlier export "
                "only"
            )


def _is_ours(path: pathlib.Path) -> bool:
    return path.name in ("config.json", INDEX_FILE) or path.suffix == ".safetensors"


def replace(partial: pathlib.Path, target: pathlib.Path) -> None:
    """Renames `partial` to `target`, and removes the old target only after that."""
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
