"""A whole training step of a few layers of V4-Flash, compiled for v5p chips that are not here.

    JAX_PLATFORMS=cpu python benchmarks/whole_step.py                      # extra `tpu`; 4 minutes
    JAX_PLATFORMS=cpu python benchmarks/whole_step.py --effort full        # as a run compiles; 20
    JAX_PLATFORMS=cpu python benchmarks/whole_step.py --wide --layers 2    # 2 minutes

Two window layers, then CSA and HCA layers in turn, and MTP, on four chips; attention,
hyper-connections and rows have Flash's sizes, 16 small experts and a small vocabulary do not. With
--wide, experts have Flash's sizes too, on 128 chips that exchange tokens, and there is no MTP. It
shows that all kernels work in one program, XLA's estimate of each part (with quick effort for
comparisons only, as that picks other tiles), and which arrays of a token's streams or heads XLA
copies into another layout: between layers there should be none.
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
from v4jax.planner.hardware import hardware_of
from v4jax.planner.lowered import lower_train
from v4jax.planner.timing import timing_of

NARROW, WIDE = ("fsdp=4", "fsdp", "v5p:2x2x1"), ("fsdp=8,expert=16", "pod", "v5p:4x4x8")
"""Mesh, layout and chips."""

COPY = re.compile(r"\s*(?:ROOT )?%\S+ = (\w+\[([\d,]*)\])\S* (copy|transpose)\(")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--effort", choices=EFFORTS, default="quick")
    parser.add_argument("--wide", action="store_true", help="experts of Flash's sizes, 128 chips")
    parser.add_argument("--kernels", default="", help="as --kernels of v4jax train")
    parser.add_argument("--hlo", help="keep the compiled text in this file")
    options = parser.parse_args()
    cfg = config(options.layers, options.seq, options.kernels, options.wide)
    target = (WIDE if options.wide else NARROW)[2]
    sizes = parse_mesh(cfg.mesh)
    lowered = lower_train(cfg, layout_for(cfg.layout, sizes), topology_mesh(target, sizes))[2]
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=EFFORTS[options.effort])
    print(f"compiled in {time.perf_counter() - start:.0f} s")
    print(f"temporary: {compiled.memory_analysis().temp_size_in_bytes / 1e9:.2f} GB")
    text = compiled.as_text()
    if options.hlo:
        pathlib.Path(options.hlo).write_text(text)
    print(f"calls of kernels in the text: {text.count('tpu_custom_call')}")
    print(f"{'part':22} forward  backward, ms; kernels apart")
    device = hardware_of("v5p").of_a_device(math.prod(sizes.values()))
    for part, seconds in timing_of(text, {}, device, sizes).parts.items():
        print(f"{part:22} {1e3 * seconds[0]:7.2f} {1e3 * seconds[1]:9.2f}")
    least = options.seq * cfg.model.hc_mult * cfg.model.hidden_size
    print(f"copies of {least} numbers or more:")
    for (kind, shape, where), count in copies(text, least).most_common():
        print(f"  {count} {kind} {shape} {where}")


def config(layers: int, seq: int, kernels: str, wide: bool):
    """The step's configuration: one row a chip."""
    ratios = (WINDOW_ONLY, WINDOW_ONLY, *(CSA, HCA) * layers)[:layers]
    model = models.flash().replace(
        num_hidden_layers=layers,
        num_hash_layers=0 if wide else min(layers, 2),
        num_nextn_predict_layers=0 if wide else 1,
        compress_ratios=ratios if wide else (*ratios, WINDOW_ONLY),
        vocab_size=16_384,
    )
    if not wide:
        model = model.replace(n_routed_experts=16, moe_intermediate_size=512)
    cfg = flash.get_config()
    mesh, layout, _ = WIDE if wide else NARROW
    return dataclasses.replace(
        cfg,
        model=model,
        mesh=mesh,
        layout=layout,
        batch_size=math.prod(parse_mesh(mesh).values()),
        gradient_accumulation=1,
        seq_len=seq,
        stages=(),
        attention="sparse",
        index_learning_rate=cfg.index_learning_rate if CSA in ratios else 0.0,
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
