"""Converts checkpoints tensor by tensor: safetensors in four precisions <-> the v4jax store.

Memory holds only a few tensors: each worker has one, as stored and as float32. Output is written
beside the target until it is whole. So a target is never half a checkpoint, and a conversion that
was killed goes on where it was when it is called again. A store made from low-precision files keeps
their scales, so that converting back gives the same bytes.

Next file to read: v4jax/convert/sources.py.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from v4jax.checkpoint.carried import said
from v4jax.checkpoint.carried_files import carried_files, copy_to
from v4jax.checkpoint.formats import check_format
from v4jax.checkpoint.tensor_files import MAX_FILE_BYTES
from v4jax.convert.merged import AnySource, Merged
from v4jax.convert.partial import PLAN_FILE, begun, begun_in_bucket, fingerprint
from v4jax.convert.sources import open_checkpoint, without_parts
from v4jax.convert.targets import to_safetensors, to_store
from v4jax.storage import (
    Place,
    Remote,
    checkpoint_name,
    checkpoint_path,
    folder_to_fill,
    is_remote,
    path_of_checkpoints,
    pinned,
    place,
    require_writable,
    streamed,
)


def convert(
    source,
    target,
    format: str = "safetensors",
    dtype: str = "float32",
    max_file_bytes: int = MAX_FILE_BYTES,
    workers: int = 2,
    drop: Sequence[str] = (),
    adapter=None,
) -> dict:
    """Converts the checkpoint `source`, of any kind and precision, to the new directory `target`.

    Args:
      format: "safetensors", or "orbax" for a v4jax store.
      dtype: "float32" or "bfloat16"; for safetensors also "fp8" or "official".
      max_file_bytes: largest size of a safetensors file.
      workers: tensors converted at a time; for safetensors, files.
      drop: what to leave out: "drafter" (DSpark, or the MTP module), "vision".
      adapter: a folder of a low-rank adapter (docs/lora.md) to merge into the matrices; None: none.

    Raises:
      ValueError: a part that the source does not have; a target that exists and is not empty, or
        that another process is writing; a dtype that the format does not have; a bad source.
      OSError: the disk is full. What was written stays beside the target for the next try.
    """
    checkpoint_name(source, "source")
    target = place(target, "target")
    _check(target, format, dtype, max_file_bytes, workers)
    origin = pinned(source)
    if is_remote(target):  # a model of the Hub goes there without a copy on this disk
        source = streamed(source)
    source = checkpoint_path(source, "source", weights=True)
    opened: AnySource = without_parts(open_checkpoint(source), drop)
    if adapter is not None:
        _check_merges(opened.format, format)
        opened = Merged(opened, adapter, source)
    files = carried_files(source)
    plan = {
        "source": fingerprint(source),
        "format": format,
        "dtype": dtype,
        "max_file_bytes": max_file_bytes,
        "drop": sorted(drop),
    }
    if adapter is not None:
        plan["adapter"] = fingerprint(checkpoint_path(adapter, "adapter", weights=True))
    with _begun(target, plan) as partial:
        copy_to(files, partial, is_run=format == "orbax")
        if format == "safetensors":
            size = to_safetensors(opened, partial, dtype, max_file_bytes, workers)
        else:
            size = to_store(opened, partial, dtype, workers)
    return {
        "source": origin,
        "target": str(target),
        "format": format,
        "dtype": dtype,
        "tensors": len(opened.kinds),
        "bytes": size,
    } | ({"carried": said(opened.carried)} if opened.carried else {})


@contextlib.contextmanager
def _begun(target: Place, plan: dict[str, Any]) -> Iterator[Place]:
    """The folder to write to, which is the target when the context ends without an error."""
    if isinstance(target, Remote):
        with begun_in_bucket(target, plan):
            yield target
        return
    target = target.absolute()
    with begun(target.with_name(f".{target.name}.partial"), plan) as partial:
        yield partial
        with contextlib.suppress(FileNotFoundError):
            target.rmdir()
        partial.rename(target)
    (target / PLAN_FILE).unlink()


def _check(target: Place, format: str, dtype: str, max_file_bytes: int, workers: int) -> None:
    """Refuses a target that cannot be written, and what the format does not have."""
    if check_format(dtype) not in ("float32", "bfloat16") and format == "orbax":
        raise ValueError(
            f"dtype: got {dtype!r}; a v4jax store holds float32 or bfloat16 (and keeps the scales "
            f"of {dtype} files)"
        )
    if isinstance(target, Remote):
        require_writable(target, "target")
    else:
        _check_local(target.absolute(), format)
    for name, value in (("max_file_bytes", max_file_bytes), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name}: got {value}; must be at least 1")


def _check_merges(stored: str, format: str) -> None:
    """Refuses to merge low-precision files into a store."""
    if format == "orbax" and stored in ("fp8", "official"):
        raise ValueError(
            f"adapter: a store of {stored} files keeps their scales, which merged matrices do not "
            "have; merge into safetensors"
        )


def _check_local(target: pathlib.Path, format: str) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: exists and is not an empty directory; choose another")
    folder_to_fill(target.parent, "target")
    if format == "orbax":
        path_of_checkpoints(target, "target")
