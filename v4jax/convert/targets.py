"""Writes a checkpoint's tensors as safetensors, or as a v4jax store.

Next file to read: v4jax/convert/partial.py.
"""

import concurrent.futures
import math

from v4jax import storage
from v4jax.checkpoint.atomic import write_json
from v4jax.checkpoint.carried import bytes_of, parts_of, stored_as_is
from v4jax.checkpoint.config_json import config_json
from v4jax.checkpoint.export import kinds_for
from v4jax.checkpoint.files import read_tensor, write_file
from v4jax.checkpoint.formats import DTYPES, Stored, encode, shapes_of
from v4jax.checkpoint.load import open_safetensors
from v4jax.checkpoint.memory_budget import MemoryBudget
from v4jax.checkpoint.names import official_shapes, plain_dtype
from v4jax.checkpoint.stream import StoreWriter
from v4jax.checkpoint.tensor_files import (
    BUDGET,
    carry,
    plan_files,
    scale_name,
    split,
    total_bytes,
    working_bytes,
    write_tensors,
)
from v4jax.convert.merged import AnySource, as_it_was
from v4jax.convert.progress import progress
from v4jax.convert.sources import RELEASED
from v4jax.convert.written import WrittenLog
from v4jax.storage import Place

_GROUP_BYTES = 32 * 2**20
"""Bytes of small tensors that one commit writes to a store."""


def to_safetensors(
    source: AnySource, partial: Place, dtype: str, max_file_bytes: int, workers: int
) -> int:
    """Fills `partial` with safetensors and config.json; returns the bytes of its tensors."""
    same = source.format == dtype  # then each tensor is stored as in the source
    kinds = source.kinds if same else kinds_for(source.cfg, dtype)

    def stored(name: str) -> Stored:
        if name in source.carried:
            return stored_as_is(source.carried, name)
        file = as_it_was(source, name)
        if file is not None and source.kinds[name] == kinds[name]:
            return file.stored(name)
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
        if name in source.carried:
            return bytes_of(parts_of(source.carried, name))
        return working_bytes(shapes[name], source.kinds[name], kinds[name])

    files = plan_files(source.cfg, kinds, max_file_bytes, source.carried)
    with progress("converting", total_bytes(files)) as wrote:
        write_tensors(partial, files, stored, wrote, workers, memory_for)
    write_json(partial / "config.json", config_json(source.cfg, dtype, source.raw))
    found = open_safetensors(partial)
    if found.kinds != kinds or found.carried.keys() != source.carried.keys():
        storage.remove(partial / "config.json")  # without it, it is no checkpoint
        raise OSError(f"{partial}: reads back with other tensors than were written")
    return total_bytes(files)


def to_store(source: AnySource, partial: Place, dtype: str, workers: int) -> int:
    """Fills `partial` with a store and config.json; returns the bytes of its tensors.

    What an earlier try wrote, and reads back as the log says, is not written again.
    """
    shapes = official_shapes(source.cfg)
    kinds = kinds_for(source.cfg, dtype)
    sizes = {
        name: math.prod(shape) * DTYPES[kinds[name].dtype].itemsize
        for name, shape in shapes.items()
    }
    log = WrittenLog(partial)
    sums, budget = log.read(), MemoryBudget(BUDGET)
    compress = source.format in ("fp8", "official")

    def memory_for(names: list[str]) -> int:
        return sum(working_bytes(shapes[name], source.kinds[name], kinds[name]) for name in names)

    def write(names: list[str]) -> None:
        left = [name for name in names if name not in sums or not store.holds(name, sums[name])]
        with budget.take(memory_for(left)):
            found = store.write((name, source.numbers(name)) for name in left)
        log.add(found)

    groups = split(sizes, _GROUP_BYTES)
    bar = progress("converting", sum(sizes.values()))
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
    _keep_form(source, partial / RELEASED)
    size = carry(source.carried, partial)
    write_json(partial / "config.json", config_json(source.cfg, source.format, source.raw))
    log.remove()
    return sum(sizes.values()) + size


def _keep_form(source: AnySource, directory: Place) -> None:
    """Writes how the source stored each tensor, and its scales unchanged."""
    storage.make_folder(directory)
    write_json(directory / "kinds.json", source.kinds)
    if source.scales:
        tensors, shapes = {}, official_shapes(source.cfg)
        for name in source.scales:
            kind = source.kinds[name]
            scale_shape = shapes_of(kind, shapes[name])[1]
            if kind.scale is not None and scale_shape is not None:
                tensors[scale_name(name)] = (kind.scale, scale_shape)
        write_file(
            directory / "scales.safetensors",
            tensors,
            ((scale_name(name), read_tensor(one)) for name, one in source.scales.items()),
        )
