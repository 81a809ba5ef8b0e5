"""Writes a Hugging Face style directory: config.json and safetensors with official names.

The directory appears whole or not at all: everything is written beside it and renamed at the end.
All processes take part, since each holds only its own shards; the first one writes.

Next file to read: v4jax/checkpoint/tensor_files.py.
"""

import contextlib
import pathlib
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from sharding.process_rows import gather
from sharding.processes import is_first
from v4jax import storage
from v4jax.checkpoint.atomic import write_json
from v4jax.checkpoint.carried import stored_as_is
from v4jax.checkpoint.carried_files import ENCODING, CarriedFile, carried_files, copy_to
from v4jax.checkpoint.config_json import config_json
from v4jax.checkpoint.files import INDEX_FILE, Header
from v4jax.checkpoint.formats import Kind, Stored, check_format, encode, kind_in, shapes_of
from v4jax.checkpoint.load import carried_of
from v4jax.checkpoint.names import (
    check_table,
    check_tree,
    official_names,
    official_shapes,
    read_slot,
)
from v4jax.checkpoint.tensor_files import MAX_FILE_BYTES, plan_files, write_tensors
from v4jax.config import ModelConfig
from v4jax.config.json_styles import read_config_json
from v4jax.generation_config import end_tokens
from v4jax.parameter_tree import spec_named
from v4jax.storage import Place, Remote, checkpoint_path, folder_to_fill, place, require_writable


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
        What v4jax/parameters.py calls float32 or int64 stays so.
      max_file_bytes: tensor bytes per file. A larger tensor gets its own file. One tensor is in
        memory at a time.
      overwrite: replace an earlier export. Other files in it, such as a tokenizer, stay; a
        subdirectory is refused, unless `source` has one of that name or it is encoding.
      source: the checkpoint that the weights come from, if any. Its config.json, if it describes
        this model, is the base of the new one, and what the trunk lacks (a drafter, a vision
        tower) goes along as it is. Its other files are copied: tokenizer, encoding/ and so on.

    Raises:
      ValueError: a directory that may not be replaced, another dtype, or a tree that does not fit
        `cfg`.
    """
    kinds = kinds_for(cfg, check_format(dtype))
    if type(max_file_bytes) is not int or max_file_bytes < 1:
        raise ValueError(f"max_file_bytes: got {max_file_bytes!r}; must be a positive integer")
    given = _of_source(cfg, source)
    target = _checked(place(directory, "directory"), overwrite, given.folders)
    if isinstance(target, Remote) and source is not None and target == place(source, "source"):
        raise ValueError(
            f"{target}: is the source too; in a bucket the old files go first, so choose another"
        )
    leaves, slots = check_tree(cfg, params), official_names(cfg)

    def gathered(name: str) -> np.ndarray:
        return gather(leaves[slots[name].path], slots[name].index)

    def stored(name: str) -> Stored:
        if name in given.tensors:
            return stored_as_is(given.tensors, name)
        whole = slots[name]._replace(index=())
        return store_slot(cfg, name, kinds[name], gathered(name), whole)

    if not is_first():
        for name in slots:  # every process takes part in gathering its shards
            gathered(name)
        return
    with _begun(target) as partial:
        copy_to(given.files, partial)
        plan = plan_files(cfg, kinds, max_file_bytes, given.tensors)
        write_tensors(partial, plan, stored)
        written = config_json(cfg, check_format(dtype), given.raw, given.end_tokens)
        write_json(partial / "config.json", written)


class _Given(NamedTuple):
    """What an export takes from the checkpoint that its weights come from.

    Attributes:
      raw: contents of its config.json; None without a source.
      files: files to copy.
      tensors: tensors to copy: what is no part of the trunk.
      end_tokens: those of its generation_config.json.
    """

    raw: dict[str, Any] | None
    files: list[CarriedFile]
    tensors: dict[str, Header]
    end_tokens: list[int]

    @property
    def folders(self) -> set[str]:
        """Folders that the export may have."""
        return {ENCODING, *(name.split("/")[0] for _, name in self.files if "/" in name)}


def _of_source(cfg: ModelConfig, source: Any) -> _Given:
    """What goes along of the source, if there is one.

    Its tensors go along if its config.json describes this model.

    Raises:
      ValueError: it cannot be read, or has a file that must not be copied.
    """
    if source is None:
        return _Given(None, [], {}, [])
    source = checkpoint_path(source, "source", weights=True)
    raw = read_config_json(source / "config.json")
    describes = raw.get("model_type") == "deepseek_v4" and not cfg.difference(
        ModelConfig.from_dict(raw)
    )
    tensors = carried_of(source) if describes else {}
    return _Given(raw, carried_files(source), tensors, end_tokens(source, cfg.vocab_size))


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


def _checked(target: Place, overwrite: bool, folders: Collection[str]) -> Place:
    """The target, after checks that an export may go there."""
    if isinstance(target, Remote):
        require_writable(target, "directory")
        _check_bucket(target, overwrite, folders)
        return target
    target = target.resolve()
    _check_target(target, overwrite, folders)
    folder_to_fill(target.parent, "directory")
    return target


def _check_target(target: pathlib.Path, overwrite: bool, folders: Collection[str]) -> None:
    """Refuses a target that is not empty or, with `overwrite`, one that is no earlier export.

    An export has no subdirectories but `folders`.
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
        if not path.is_file() and path.name not in folders:
            raise ValueError(
                f"{target}: holds the directory {path.name}; overwrite replaces an earlier export "
                "only"
            )


def _check_bucket(target: Remote, overwrite: bool, folders: Collection[str]) -> None:
    """`_check_target` of a folder in a bucket."""
    found = storage.listing(target)
    if found and not overwrite:
        raise ValueError(
            f"{target}: not empty; give a new folder, or overwrite=True to replace an earlier "
            "export"
        )
    nested = (name for name in found if "/" in name and name.split("/")[0] not in folders)
    below = next(nested, None)
    if below is not None:
        raise ValueError(f"{target}: holds {below}; overwrite replaces an earlier export only")


def _is_ours(path: Place) -> bool:
    return path.name in ("config.json", INDEX_FILE) or path.suffix == ".safetensors"


@contextlib.contextmanager
def _begun(target: Place) -> Iterator[Place]:
    """A directory beside `target` that replaces it at the end, or is removed after a failure.

    It begins with the files of the target that are no export's. In a bucket it is the target, less
    its export: until config.json is written, as the last, it is no checkpoint.
    """
    if isinstance(target, Remote):
        ours = [path for path in target.iterdir() if _is_ours(path)]
        for path in sorted(ours, key=lambda path: path.name != "config.json"):
            storage.remove(path)
        yield target
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir()
    try:
        for path in target.iterdir() if target.exists() else ():
            if path.is_dir():
                shutil.copytree(path, partial / path.name)
            elif not _is_ours(path):
                shutil.copy2(path, partial)
        yield partial
        replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
