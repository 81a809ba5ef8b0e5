"""Host memory while a large checkpoint is loaded packed: what the process holds beside its arrays.

On a simulated mesh the arrays lie in the host's memory too; their bytes are taken off. The
checkpoint is synthetic: random codes, scales and numbers in official formats, at least --gb.

    python benchmarks/packed_load.py [--gb 8] [--folder DIR]

Bar (issue 26): at most 4 GB a process, whatever the model.
"""

import argparse
import json
import math
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

MESH, LAYOUT = "fsdp=2,expert=2", "ep_fsdp"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=8, help="size of the checkpoint (default 8)")
    parser.add_argument("--folder", help="where it is written for the time (default: /tmp)")
    parser.add_argument("--load", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(measured(arguments.load)))
        return
    folder = pathlib.Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        size = write_checkpoint(folder, arguments.gb)
        # A process of its own, because writing has used memory too.
        command = [sys.executable, __file__, "--load", str(folder)]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    finally:
        shutil.rmtree(folder)
    print(f"checkpoint {size / 1e9:.1f} GB, arrays {result['arrays'] / 1e9:.1f} GB")
    print(f"beside them, at most {result['beside'] / 1e9:.2f} GB (bar 4), {result['s']:.0f} s")


def model_of(gigabytes: float):
    """V4-Flash's widths, with as many layers and experts as the size asks for."""
    from configs.models import flash

    layers = 4
    one_expert = 3 * flash().hidden_size * flash().moe_intermediate_size * 0.53
    experts = max(8, 4 * math.ceil(gigabytes * 1e9 / layers / one_expert / 4))
    return flash().replace(
        num_hidden_layers=layers,
        n_routed_experts=experts,
        compress_ratios=flash().compress_ratios[:layers],
        num_nextn_predict_layers=0,
    )


def write_checkpoint(folder: pathlib.Path, gigabytes: float) -> int:
    """Writes random codes under the official names; returns the bytes written."""
    from v4jax.checkpoint.config_json import config_json
    from v4jax.checkpoint.files import file_size, write_file
    from v4jax.checkpoint.formats import DTYPES, kind_in, shapes_of
    from v4jax.checkpoint.names import official_shapes

    cfg = model_of(gigabytes)
    (folder / "config.json").write_text(json.dumps(config_json(cfg, "official")))
    planned = {}
    for name, shape in official_shapes(cfg).items():
        kind = kind_in("official", name)
        data, scale = shapes_of(kind, shape)
        planned[name] = (kind.dtype, data)
        if scale is not None:
            planned[f"{name.removesuffix('weight')}scale"] = (kind.scale, scale)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 120, 2**26, np.uint8)  # no e4m3 NaN

    def arrays():
        for name, (dtype, shape) in planned.items():
            count = int(np.prod(shape)) * DTYPES[dtype].itemsize
            if dtype in ("I64", "I32"):
                experts = np.arange(np.prod(shape)) % cfg.n_routed_experts
                yield name, experts.reshape(shape).astype(DTYPES[dtype])
            elif dtype in ("F32", "BF16"):
                yield name, np.full(shape, 0.01, DTYPES[dtype])
            elif name.endswith(".scale"):
                yield name, np.full(shape, 118, np.uint8).view(DTYPES[dtype])
            else:
                yield name, np.resize(noise, count).view(DTYPES[dtype]).reshape(shape)

    write_file(folder / "model.safetensors", planned, arrays())
    return file_size(planned)


def measured(folder: str) -> dict[str, float]:
    """Loads it packed; bytes of the arrays, and the most the process held beside them."""
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    import jax

    import v4jax

    start = time.perf_counter()
    _, params = v4jax.load(folder, dtype="packed", mesh=MESH, layout=LAYOUT)
    jax.block_until_ready(params)
    took = time.perf_counter() - start
    arrays = sum(
        shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"arrays": arrays, "beside": peak - arrays, "s": took}


if __name__ == "__main__":
    main()
