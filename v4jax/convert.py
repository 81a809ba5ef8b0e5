"""Converts checkpoints tensor by tensor: safetensors in four precisions <-> the v4jax store.

Memory holds only a few tensors: each worker has one, as stored and as float32. Output is written
beside the target until it is whole. So a target is never half a checkpoint, and a conversion that
was killed goes on where it was when it is called again. A store made from low-precision files keeps
their scales, so that converting back gives the same bytes.

Next file to read: v4jax/cli/main.py.
"""

import concurrent.futures
import contextlib
import fcntl
import json
import math
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from v4jax.checkpoint.export import (
    BUDGET,
    MAX_FILE_BYTES,
    carried_files,
    config_json,
    kinds_for,
    plan_files,
    scale_name,
    split,
    store_slot,
    total_bytes,
    working_bytes,
    write_json,
    write_tensors,
)
from v4jax.checkpoint.files import Header, dtype_name, headers_of, read_tensor, write_file
from v4jax.checkpoint.formats import (
    DTYPES,
    Kind,
    Stored,
    allowed_kinds,
    check_format,
    encode,
    format_of,
    scale_of,
    shapes_of,
)
from v4jax.checkpoint.load import Source, open_safetensors
from v4jax.checkpoint.memory_budget import MemoryBudget
from v4jax.checkpoint.names import Slot, official_names, official_shapes, plain_dtype
from v4jax.checkpoint.store import is_run
from v4jax.checkpoint.stream import StoreWriter, open_leaves
from v4jax.config import ModelConfig
from v4jax.config.json_styles import read_config_json
from v4jax.parameter_tree import spec_named
from v4jax.storage import folder_of_checkpoint, folder_to_fill, local_path, path_of_checkpoints
from v4jax.untrusted import file_in, read_json

_GROUP_BYTES = 32 * 2**20
"""Bytes of small tensors that one commit writes to a store."""
_RELEASED = "released"
"""Folder of a store for the source's scales, and for how the source stored each tensor."""


def convert(
    source,
    target,
    format: str = "safetensors",
    dtype: str = "float32",
    max_file_bytes: int = MAX_FILE_BYTES,
    workers: int = 2,
) -> dict:
    """Converts the checkpoint `source`, of any kind and precision, to the new directory `target`.

    Args:
      format: "safetensors", or "orbax" for a v4jax store.
      dtype: "float32" or "bfloat16"; for safetensors also "fp8" or "official".
      max_file_bytes: largest size of a safetensors file.
      workers: tensors converted at a time; for safetensors, files.

    Raises:
      ValueError: a target that exists and is not empty, or that another process is writing; a dtype
        that the format does not have; a bad source.
      OSError: the disk is full. What was written stays beside the target for the next try.
    """
    source = local_path(source, "source")
    target = local_path(target, "target").absolute()
    if check_format(dtype) not in ("float32", "bfloat16") and format == "orbax":
        raise ValueError(
            f"dtype: got {dtype!r}; a v4jax store holds float32 or bfloat16 (and keeps the scales "
            f"of {dtype} files)"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: exists and is not an empty directory; choose another")
    folder_to_fill(target.parent, "target")
    if format == "orbax":
        path_of_checkpoints(target, "target")
    for name, value in (("max_file_bytes", max_file_bytes), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name}: got {value}; must be at least 1")
    opened = open_checkpoint(source)
    carried = carried_files(source)
    plan = {
        "source": _fingerprint(source),
        "format": format,
        "dtype": dtype,
        "max_file_bytes": max_file_bytes,
    }
    with _begun(target.with_name(f".{target.name}.partial"), plan) as partial:
        if format == "safetensors":
            size = _to_safetensors(opened, partial, dtype, max_file_bytes, workers)
        else:
            size = _to_store(opened, partial, dtype, workers)
        for path in carried:
            shutil.copyfile(path, partial / path.name)
        with contextlib.suppress(FileNotFoundError):
            target.rmdir()
        partial.rename(target)
    (target / "plan.json").unlink()
    return {
        "target": str(target),
        "format": format,
        "dtype": dtype,
        "tensors": len(opened.kinds),
        "bytes": size,
    }


def compare(first, second) -> dict:
    """Compares two checkpoints of one model, of any kinds and precisions.

    Returns:
      The number of tensors and of equal ones; the name of the worst tensor, its largest difference,
        and that difference divided by the largest number of the first checkpoint's tensor.

    Raises:
      ValueError: a bad checkpoint, or two models (names the first tensor or shape that differs).
    """
    a = open_checkpoint(local_path(first, "first"))
    b = open_checkpoint(local_path(second, "second"))
    shapes, others = official_shapes(a.cfg), official_shapes(b.cfg)
    for name in shapes | others:
        if shapes.get(name) != others.get(name):
            raise ValueError(
                f"{name}: {shapes.get(name)} in {first}, {others.get(name)} in {second}; these are "
                "two models"
            )
    equal, worst = 0, ("", 0.0, 0.0)
    with _progress("comparing", len(shapes), bytes_=False) as wrote:
        for name in shapes:
            x, y = (np.asarray(side.numbers(name), np.float32) for side in (a, b))
            difference = float(np.max(np.abs(x - y), initial=0))
            equal += difference == 0
            relative = difference / max(
                float(np.max(np.abs(x), initial=0)), np.finfo(np.float32).tiny
            )
            worst = max(worst, (name, difference, relative), key=lambda one: one[2])
            wrote(1)
    return {
        "tensors": len(shapes),
        "equal": equal,
        "worst": worst[0],
        "difference": worst[1],
        "relative": worst[2],
    }


# ---- sources -------------------------------------------------------------------------------------


class StoreSource(NamedTuple):
    """The newest checkpoint of a v4jax store or run, read like a load.Source."""

    directory: pathlib.Path
    cfg: ModelConfig
    raw: dict[str, Any]
    kinds: dict[str, Kind]
    slots: dict[str, Slot]
    leaves: dict[tuple[str, ...], Any]
    scales: dict[str, Header]

    @property
    def format(self) -> str:
        return format_of(self.kinds)

    def numbers(self, name: str) -> np.ndarray:
        slot = self.slots[name]
        leaf = self.leaves[slot.path]
        ids = spec_named(name).precision == "int64"
        kind = Kind("I64" if ids else dtype_name(leaf.dtype.numpy_dtype))
        try:
            read = leaf[slot.index].read().result()
        except ValueError as error:  # TensorStore's error for a chunk whose checksum is wrong
            raise ValueError(f"{self.directory}: {name} is damaged: {error}") from None
        return store_slot(self.cfg, name, kind, read, slot._replace(index=())).data

    def scale(self, name: str) -> np.ndarray | None:
        if name not in self.scales:
            return None
        return scale_of(self.kinds[name], Stored(None, read_tensor(self.scales[name], once=True)))


def open_checkpoint(directory) -> Source | StoreSource:
    """Opens any checkpoint without reading its tensors.

    Raises:
      ValueError: no checkpoint, or one that does not fit its config.json.
    """
    directory = folder_of_checkpoint(directory, "directory")
    if not is_run(directory):
        return open_safetensors(directory)._replace(once=True)
    cfg = ModelConfig.from_json(directory)
    leaves = open_leaves(directory, cfg)
    kinds, scales = (
        kinds_for(
            cfg,
            "bfloat16"
            if any(leaf.dtype.numpy_dtype == DTYPES["BF16"] for leaf in leaves.values())
            else "float32",
        ),
        {},
    )
    if (directory / _RELEASED).is_dir():
        try:
            kinds, scales = _read_form(directory / _RELEASED, official_shapes(cfg))
        except ValueError as error:
            raise ValueError(f"{directory / _RELEASED}: {error}") from None
    return StoreSource(
        directory,
        cfg,
        read_config_json(directory / "config.json"),
        kinds,
        official_names(cfg),
        leaves,
        scales,
    )


def _read_form(
    directory: pathlib.Path, shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Kind], dict[str, Header]]:
    """Reads what `_keep_form` wrote.

    Returns:
      Official name -> how the source stored it, and official name -> header of its scales.

    Raises:
      ValueError: the files do not belong to this model.
    """
    try:
        raw = read_json(file_in(directory, "kinds.json"))
        kinds = {
            name: next(kind for kind in allowed_kinds(name) if list(kind) == raw[name])
            for name in shapes
        }
        low = {
            name: shapes_of(kind, shapes[name])[1]
            for name, kind in kinds.items()
            if kind.scale is not None
        }
        scales = (
            {one.stored: one for one in headers_of(file_in(directory, "scales.safetensors"))}
            if low
            else {}
        )
    except (FileNotFoundError, KeyError, TypeError, StopIteration) as error:
        raise ValueError(
            "kinds.json, or scales.safetensors, does not belong to this model "
            f"({type(error).__name__}: {error})"
        ) from None
    for name, shape in low.items():
        one = scales.get(scale_name(name))
        if one is None or (one.dtype, one.shape) != (kinds[name].scale, shape):
            raise ValueError(
                f"scales.safetensors: {scale_name(name)} is not {kinds[name].scale} {list(shape)}"
            )
    return kinds, {name: scales[scale_name(name)] for name in low}


# ---- targets -------------------------------------------------------------------------------------


def _to_safetensors(
    source: Source | StoreSource,
    partial: pathlib.Path,
    dtype: str,
    max_file_bytes: int,
    workers: int,
) -> int:
    same = source.format == dtype  # then each tensor is stored as in the source
    kinds = source.kinds if same else kinds_for(source.cfg, dtype)

    def stored(name: str) -> Stored:
        if isinstance(source, Source) and source.kinds[name] == kinds[name]:
            return source.stored(name)
        try:
            return encode(
                kinds[name],
                source.numbers(name),
                source.scale(name) if source.kinds[name].dtype == kinds[name].dtype else None,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    shapes = official_shapes(source.cfg)

    def memory_for(name: str) -> int:
        return working_bytes(shapes[name], source.kinds[name], kinds[name])

    files = plan_files(source.cfg, kinds, max_file_bytes)
    with _progress("converting", total_bytes(files)) as wrote:
        write_tensors(partial, files, stored, wrote, workers, memory_for)
    write_json(partial / "config.json", config_json(source.cfg, dtype, source.raw))
    if open_safetensors(partial).kinds != kinds:
        raise OSError(f"{partial}: reads back with other tensors than were written")
    return total_bytes(files)


def _to_store(source: Source | StoreSource, partial: pathlib.Path, dtype: str, workers: int) -> int:
    shapes = official_shapes(source.cfg)
    kinds = kinds_for(source.cfg, dtype)
    sizes = {
        name: math.prod(shape) * DTYPES[kinds[name].dtype].itemsize
        for name, shape in shapes.items()
    }
    log = partial / "written.txt"
    sums = (
        dict(line.split() for line in log.read_text().splitlines() if line.count(" ") == 1)
        if log.exists()
        else {}
    )
    lock, budget = threading.Lock(), MemoryBudget(BUDGET)
    compress = source.format in ("fp8", "official")

    def memory_for(names: list[str]) -> int:
        return sum(working_bytes(shapes[name], source.kinds[name], kinds[name]) for name in names)

    def write(names: list[str]) -> None:
        left = [name for name in names if name not in sums or not store.holds(name, sums[name])]
        with budget.take(memory_for(left)):
            found = store.write((name, source.numbers(name)) for name in left)
        with lock, open(log, "a") as file:
            file.writelines(f"{name} {one}\n" for name, one in found.items())

    groups = split(sizes, _GROUP_BYTES)
    bar = _progress("converting", sum(sizes.values()))
    with (
        StoreWriter(partial, source.cfg, plain_dtype(dtype), compress) as store,
        bar as wrote,
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
    ):
        try:
            for names, _ in zip(groups, pool.map(write, groups), strict=True):
                wrote(sum(sizes[name] for name in names))
            store.finish()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    _keep_form(source, partial / _RELEASED)
    write_json(partial / "config.json", config_json(source.cfg, source.format, source.raw))
    log.unlink()
    return sum(sizes.values())


def _keep_form(source: Source | StoreSource, directory: pathlib.Path) -> None:
    """Writes how the source stored each tensor, and its scales unchanged."""
    directory.mkdir(exist_ok=True)
    write_json(directory / "kinds.json", source.kinds)
    if source.scales:
        shapes = {
            name: shapes_of(source.kinds[name], shape)[1]
            for name, shape in official_shapes(source.cfg).items()
        }
        tensors = {
            scale_name(name): (source.kinds[name].scale, shapes[name]) for name in source.scales
        }
        write_file(
            directory / "scales.safetensors",
            tensors,
            ((scale_name(name), read_tensor(one)) for name, one in source.scales.items()),
        )


@contextlib.contextmanager
def _begun(partial: pathlib.Path, plan: dict[str, Any]) -> Iterator[pathlib.Path]:
    """The directory in which a conversion is made.

    What an earlier try of the same conversion left is kept; anything else is removed.
    """
    plan = json.loads(json.dumps(plan))
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{partial}: another conversion is writing there") from None
        try:
            earlier = json.loads((partial / "plan.json").read_text())
        except (OSError, ValueError):
            earlier = None
        if earlier != plan:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write_json(partial / "plan.json", plan)
        try:
            yield partial
        except ValueError:  # bad input, which the next try would meet again
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            partial.with_suffix(".lock").unlink(missing_ok=True)


def _fingerprint(source: pathlib.Path) -> list:
    files = sorted(path for path in source.rglob("*") if path.is_file())
    return [
        str(source.absolute()),
        [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    ]


@contextlib.contextmanager
def _progress(what: str, total: int, bytes_: bool = True) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn(what),
        BarColumn(),
        *([DownloadColumn()] if bytes_ else [TextColumn("{task.completed:.0f}/{task.total:.0f}")]),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda size: bar.advance(task, size)
