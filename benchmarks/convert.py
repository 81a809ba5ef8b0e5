"""Throughput and peak memory of `v4jax convert`, beside a plain copy of the same files.

    python benchmarks/convert.py [--gigabytes 4] [--folder DIR] [--only store,back]

The script writes a synthetic checkpoint of that size in bfloat16 (V4's parts, random numbers) below
DIR. It converts it to a store and back, to an official release, and that to a store and to
bfloat16. Each conversion runs in a fresh process, whose time (without start-up) and largest
resident memory are taken. At the end the script removes everything. Rates are bytes of the larger
side per second: every one of them is read or written.

A virtual machine may give free memory back to its host; asking for it again costs more than a disk.
A copy right after another one was removed gets the same pages again. It is several times as fast as
any copy that begins on a machine at rest. So each copy and each conversion begins after a pause.
The fastest copy without one is shown beside it.

"Of the processor's" is the conversion's own user time, shared evenly by the workers' cores, over
its time. What is missing to 1.00 is the kernel's time (pages, copies) and waiting. The last rows
are arithmetic alone, on as many threads: rounding to and from low precision, transposing,
compressing.
"""

import argparse
import concurrent.futures
import functools
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import ml_dtypes
import numpy as np
import tensorstore as ts

from v4jax.checkpoint.export import (
    config_json,
    kinds_for,
    plan_files,
    total_bytes,
    write_json,
    write_tensors,
)
from v4jax.checkpoint.formats import DTYPES, Stored
from v4jax.checkpoint.names import official_shapes, turned
from v4jax.checkpoint.stream import create
from v4jax.config import ModelConfig
from v4jax.quant import fp8, mxfp4

WORKERS = 2
ROWS = {
    "store": ("bf16", "orbax", "bfloat16"),
    "back": ("store", "safetensors", "bfloat16"),
    "official": ("bf16", "safetensors", "official"),
    "again": ("official", "safetensors", "official"),
    "low": ("official", "orbax", "bfloat16"),
    "out": ("low", "safetensors", "official"),
    "wide": ("official", "safetensors", "bfloat16"),
}
"""Target of a conversion -> source, format, dtype; in the order in which they run."""
PAUSE = 15
"""Seconds of rest before each measurement, in which a host takes back what was freed."""
CHILD = """
import json, resource, sys, time
from sharding.mesh import keep_freed_memory
keep_freed_memory(one_heap=True)  # as the command does
from v4jax.convert import convert
from v4jax.checkpoint.names import official_shapes
from v4jax.config import ModelConfig
# Start-up: tracing the model for its shapes, once a process.
official_shapes(ModelConfig.from_json(sys.argv[1]))
used = resource.getrusage(resource.RUSAGE_SELF)
begin, before = time.perf_counter(), (used.ru_utime, used.ru_stime)
source, target, format, dtype, workers = sys.argv[1:6]
convert(
    source, target, format=format, dtype=dtype, max_file_bytes=10**9, workers=int(workers)
)
seconds = time.perf_counter() - begin
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([seconds, int(peak) * 1024, used.ru_utime - before[0], used.ru_stime - before[1]]))
"""


def model(gigabytes: float) -> ModelConfig:
    """V4's parts at about that many bytes in bfloat16; most are experts. The vocabulary is the real
    one.
    """
    experts = max(2, round((gigabytes * 1e9 / 2 - 2 * 129280 * 1024) / (4 * 3 * 1024 * 1024)))
    return ModelConfig(
        vocab_size=129280,
        hidden_size=1024,
        moe_intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=16,
        head_dim=128,
        qk_rope_head_dim=64,
        q_lora_rank=512,
        o_groups=4,
        o_lora_rank=512,
        n_routed_experts=experts,
        num_experts_per_tok=2,
        routed_scaling_factor=1.5,
        compress_ratios=(128, 4, 128, 0),
        num_hash_layers=1,
        index_n_heads=16,
        compress_rope_theta=160000.0,
    )


def make(cfg: ModelConfig, directory: pathlib.Path) -> int:
    """Writes the synthetic checkpoint and returns its size in bytes."""
    kinds, shapes = kinds_for(cfg, "bfloat16"), official_shapes(cfg)
    rng = np.random.default_rng(0)
    pool = rng.standard_normal(2 * 10**8, np.float32).astype(ml_dtypes.bfloat16)

    def stored(name: str) -> Stored:
        if name.endswith("tid2eid"):
            return Stored(
                rng.permuted(
                    np.tile(np.arange(cfg.n_routed_experts), (shapes[name][0], 1)), axis=1
                )[:, : shapes[name][1]].copy()
            )
        size = math.prod(shapes[name])
        start = int(rng.integers(len(pool) - size))
        return Stored(
            pool[start : start + size].reshape(shapes[name]).astype(DTYPES[kinds[name].dtype])
        )

    directory.mkdir()
    files = plan_files(cfg, kinds, 10**9)
    write_tensors(directory, files, stored)
    write_json(directory / "config.json", config_json(cfg, "bfloat16"))
    return total_bytes(files)


def copy(source: pathlib.Path, target: pathlib.Path) -> float:
    """Seconds of a plain copy that is on the disk at the end, as a conversion is."""
    begin = time.perf_counter()
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with open(target / path.name) as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - begin
    shutil.rmtree(target)
    return seconds


def convert(source, target, format: str, dtype: str) -> tuple[float, int, float, float]:
    """Runs one conversion in a process of its own.

    Returns (seconds, peak resident bytes, user and kernel seconds of all threads).
    """
    command = [sys.executable, "-c", CHILD, source, target, format, dtype, str(WORKERS)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    return tuple(json.loads(done.stdout))


def processor_bound(action, size: int) -> float:
    """Bytes of float32 per second that `action` handles on WORKERS threads."""
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(lambda _: action(), range(WORKERS)))
        begin = time.perf_counter()
        list(pool.map(lambda _: action(), range(4 * WORKERS)))
    return 4 * WORKERS * size / (time.perf_counter() - begin)


def compress(array: np.ndarray) -> None:
    """Compresses a matrix as TensorStore does for such a store, without the disk."""
    metadata = create(array.shape, array.dtype, 0, compress=True)
    ts.open({"driver": "zarr3", "kvstore": "memory://"} | metadata).result().write(array).result()


def size_of(directory: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument(
        "--only", default=",".join(ROWS), help="targets; those that they are made from are made too"
    )
    arguments = parser.parse_args()
    wanted = set(arguments.only.split(","))
    if not wanted <= ROWS.keys():
        parser.error(f"--only: got {arguments.only}; allowed: {', '.join(ROWS)}")
    for target in reversed(ROWS):
        wanted |= {ROWS[target][0]} if target in wanted else set()
    root = pathlib.Path(tempfile.mkdtemp(dir=arguments.folder, prefix="v4jax-convert-"))
    try:
        cfg = model(arguments.gigabytes)
        size = make(cfg, root / "bf16")
        at_once, at_rest = min(copy(root / "bf16", root / "copy") for _ in range(3)), []
        for _ in range(3):
            time.sleep(PAUSE)
            at_rest.append(copy(root / "bf16", root / "copy"))
        rate = size / sorted(at_rest)[1]
        largest = max(4 * math.prod(shape) for shape in official_shapes(cfg).values())
        bound = 1.5e9 + 2 * largest
        print(
            f"{size / 1e9:.2f} GB in bfloat16; largest slice {largest / 1e9:.2f} GB in float32: "
            f"at most {bound / 1e9:.2f} GB of memory"
        )
        print(
            "| conversion | from, to GB | seconds | MB/s | of the copy's | user s | kernel s | "
            "of the processor's | peak GB |\n|---|---|---|---|---|---|---|---|---|"
        )
        print(
            f"| plain copy, fsync, median of 3 | {size / 1e9:.2f} | {size / rate:.1f} | "
            f"{rate / 1e6:.0f} | 1.00 | | | | |"
        )
        print(
            f"| the same right after another one, best of 3 | {size / 1e9:.2f} | {at_once:.1f} "
            f"| {size / at_once / 1e6:.0f} | | | | | |",
            flush=True,
        )
        for target, (source, format, dtype) in ROWS.items():
            if target not in wanted:
                continue
            time.sleep(PAUSE)
            seconds, peak, user, kernel = convert(root / source, root / target, format, dtype)
            sizes = size_of(root / source), size_of(root / target)
            moved = max(*sizes, size if "bfloat16" in dtype or source in ("bf16", "low") else 0)
            print(
                f"| {source} -> {target} ({format}, {dtype}) | {sizes[0] / 1e9:.2f}, "
                f"{sizes[1] / 1e9:.2f} | {seconds:.1f} | {moved / seconds / 1e6:.0f} "
                f"| {moved / seconds / rate:.2f} | {user:.1f} | {kernel:.1f} | "
                f"{user / WORKERS / seconds:.2f} | "
                f"{peak / 1e9:.2f}{'' if peak <= bound else ' ABOVE THE BOUND'} |",
                flush=True,
            )
            if target in ("back", "again", "out", "wide"):
                shutil.rmtree(root / target)
        x = np.random.default_rng(0).standard_normal((2048, 2048), np.float32)
        for code, numbers in ((fp8, x), (mxfp4, x.astype(ml_dtypes.bfloat16))):
            stored = code.quantise(numbers)
            for what, action in (
                ("to", functools.partial(code.quantise, numbers)),
                ("from", functools.partial(code.dequantise, *stored)),
            ):
                print(
                    f"| processor alone: {what} {code.__name__.split('.')[-1]}, as bfloat16 "
                    f"bytes | | | {processor_bound(action, x.nbytes) / 2e6:.0f} | | | | | |"
                )
        half = x.astype(ml_dtypes.bfloat16)
        print(
            f"| processor alone: transposing bfloat16 | | | "
            f"{processor_bound(lambda: turned(half, half.dtype), half.nbytes) / 1e6:.0f} | | | "
            f"| | |"
        )
        numbers = mxfp4.dequantise(*mxfp4.quantise(half))
        print(
            f"| processor alone: a store's compression | | | "
            f"{processor_bound(lambda: compress(numbers), numbers.nbytes) / 1e6:.0f} | | | | | |"
        )
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
