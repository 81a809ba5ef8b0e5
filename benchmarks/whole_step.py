"""A whole training step of a few layers of V4-Flash, compiled for four v5p chips that are not here.

    JAX_PLATFORMS=cpu python benchmarks/whole_step.py                  # extra `tpu`; 4 minutes
    JAX_PLATFORMS=cpu python benchmarks/whole_step.py --effort full    # as a run compiles; 20

Two window layers, then CSA and HCA layers in turn, and MTP; attention, hyper-connections and rows
have Flash's sizes, 16 small experts and a small vocabulary do not. It shows that all kernels work
in one program, and which arrays of a token's streams or heads XLA copies into another layout:
between layers there should be none.
"""

import argparse
import collections
import dataclasses
import math
import pathlib
import re
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from configs import flash, models
from sharding.mesh import parse_mesh
from sharding.rules import layout_for
from sharding.targets import topology_mesh
from v4jax.config import CSA, HCA, WINDOW_ONLY
from v4jax.planner.compiled import EFFORTS
from v4jax.planner.lowered import lower_train

MESH, TARGET = "fsdp=4", "v5p:2x2x1"
COPY = re.compile(r"\s*(?:ROOT )?%\S+ = (\w+\[([\d,]*)\])\S* (copy|transpose)\(")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--effort", choices=EFFORTS, default="quick")
    parser.add_argument("--kernels", default="", help="as --kernels of v4jax train")
    parser.add_argument("--hlo", help="keep the compiled text in this file")
    options = parser.parse_args()
    cfg = config(options.layers, options.seq, options.kernels)
    sizes = parse_mesh(MESH)
    lowered = lower_train(cfg, layout_for(cfg.layout, sizes), topology_mesh(TARGET, sizes))[2]
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=EFFORTS[options.effort])
    print(f"compiled in {time.perf_counter() - start:.0f} s")
    print(f"temporary: {compiled.memory_analysis().temp_size_in_bytes / 1e9:.2f} GB")
    text = compiled.as_text()
    if options.hlo:
        pathlib.Path(options.hlo).write_text(text)
    print(f"calls of kernels in the text: {text.count('tpu_custom_call')}")
    least = options.seq * cfg.model.hc_mult * cfg.model.hidden_size
    print(f"copies of {least} numbers or more:")
    for (kind, shape, where), count in copies(text, least).most_common():
        print(f"  {count} {kind} {shape} {where}")


def config(layers: int, seq: int, kernels: str):
    """The step's configuration: one row a chip."""
    ratios = (WINDOW_ONLY, WINDOW_ONLY, *(CSA, HCA) * layers)[:layers]
    model = models.flash().replace(
        num_hidden_layers=layers,
        num_hash_layers=min(layers, 2),
        compress_ratios=(*ratios, WINDOW_ONLY),
        n_routed_experts=16,
        moe_intermediate_size=512,
        vocab_size=16_384,
    )
    return dataclasses.replace(
        flash.get_config(),
        model=model,
        mesh=MESH,
        layout="fsdp",
        batch_size=4,
        gradient_accumulation=1,
        seq_len=seq,
        stages=(),
        attention="sparse",
        kernels=kernels,
    )


def copies(text: str, least: int) -> collections.Counter:
    """(kind, shape, part of the model) -> how often the text has such a copy."""
    found = collections.Counter()
    for line in text.splitlines():
        match = COPY.match(line)
        if match and math.prod(int(n) for n in match[2].split(",") if n) >= least:
            source = re.search(r'op_name="([^"]*)"', line)
            found[match[3], match[1], source[1][-60:] if source else ""] += 1
    return found


if __name__ == "__main__":
    main()
