"""One training step of the demo on 8 simulated devices, beside the same batch on one device.

    python benchmarks/meshes.py --compile     # at any load; again, if it was stopped
    python benchmarks/meshes.py [--steps 6] [--meshes "data=8" "expert=4,tensor=2"]   # when quiet

The cores are the same, so what a mesh adds is overhead: exchanges as copies in memory, repeated
work, smaller products, and eight programs that take turns. The figures do not say how fast a layout
is on eight chips. Compiling takes longer than all steps, so programs stay in a cache, and a few
meshes at a time can be measured while a shared machine is quiet.
"""

import argparse
import dataclasses
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

MESHES = [
    "data=8",
    "fsdp=8",
    "expert=8",
    "data=2,tensor=4",
    "expert=4,tensor=2",
    "data=2,fsdp=2,expert=2",
    "context=8",
    "context=4,expert=2",
    "context=2,expert=2,tensor=2",
    "fsdp=2,context=2,tensor=2",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6, help="steps timed; the fastest counts")
    parser.add_argument("--meshes", nargs="*", default=MESHES)
    parser.add_argument("--compile", action="store_true", help="compile only, into the cache")
    parser.add_argument(
        "--cache",
        default=pathlib.Path(tempfile.gettempdir()) / "v4jax-meshes",
        help="where compiled programs stay",
    )
    arguments = parser.parse_args()
    import jax

    from sharding.mesh import simulate_devices

    simulate_devices(8)
    jax.config.update("jax_compilation_cache_dir", str(arguments.cache))
    from configs import demo

    cfg = dataclasses.replace(demo.get_config(), batch_size=8)
    if arguments.compile:
        for mesh in ("", *arguments.meshes):
            seconds(dataclasses.replace(cfg, mesh=mesh), 0)
            print(f"{mesh or 'one device'} is compiled", flush=True)
        return
    alone = seconds(dataclasses.replace(cfg, mesh=""), arguments.steps)
    print("| mesh | ms a step | / one device |\n|---|---|---|")
    print(f"| one device | {alone * 1e3:.0f} | 1.00 |", flush=True)
    for mesh in arguments.meshes:
        took = seconds(dataclasses.replace(cfg, mesh=mesh), arguments.steps)
        print(f"| {mesh} | {took * 1e3:.0f} | {took / alone:.2f} |", flush=True)


def seconds(cfg, steps: int) -> float:
    """Seconds of the fastest of `steps` steps, after two to warm up; 0 without steps."""
    import jax
    import numpy as np

    from sharding.mesh import make_mesh, parse_mesh
    from sharding.rules import AxisRules, layout_for
    from v4jax.train.step import batch_sharding, compile_step, init_state, state_shardings

    sizes = parse_mesh(cfg.mesh)
    mesh, rules = make_mesh(sizes), layout_for(cfg.layout, sizes) if cfg.mesh else AxisRules()
    with jax.set_mesh(mesh):
        places = state_shardings(cfg, rules, mesh)
        state = init_state(cfg, places)
        rng = np.random.default_rng(0)
        tokens = rng.integers(
            0, cfg.model.vocab_size, (cfg.batch_size, cfg.seq_len), dtype=np.int32
        )
        batch = jax.device_put(
            {"tokens": tokens, "segment_ids": np.ones_like(tokens)}, batch_sharding(rules, mesh)
        )
        step = compile_step(cfg, rules, places, mesh).lower(state, batch).compile()
        if not steps:
            return 0.0
        times = []
        for _ in range(steps + 2):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - start)
    return min(times[2:])


if __name__ == "__main__":
    main()
