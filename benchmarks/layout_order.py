"""Does the estimate order layouts as the machine does? Kendall's tau of the two orders.

    export JAX_PLATFORMS=cpu
    python benchmarks/layout_order.py --compile     # at any load; again, if it was stopped
    python benchmarks/layout_order.py [--turns 8] [--cases dp:data=8 ...]    # on a quiet machine
    python benchmarks/layout_order.py --turns 0 [--profile cpu.json]         # only the table

Steps of one global batch on meshes of 8 simulated devices are timed, and predicted with this
machine's measured profile. Each layout runs in a process of its own, since ten programs of eight
devices in one process came to wait for each other for ever (XLA:CPU of jax 0.10.2). The fastest
step counts. The model is the demo's with two layers, one CSA and one HCA. Compiling takes most of
the time, so programs stay in a cache, and a run that was stopped continues with the missing ones.
The fastest times of all runs are kept beside them, so that a few layouts at a time can be timed
while a shared machine is quiet.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

CASES = [
    "dp:data=8",
    "fsdp:fsdp=8",
    "ep:expert=8",
    "full:data=2,tensor=4",
    "ep_tp:expert=4,tensor=2",
    "ep_fsdp:data=2,fsdp=2,expert=2",
    "cp_ep:context=8",
    "cp_ep:context=4,expert=2",
    "full:fsdp=2,context=2,tensor=2",
    "pod:expert=8",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=8, help="steps of each that are timed")
    parser.add_argument(
        "--profile",
        default="cpu",
        help="hardware profile: a name or a JSON file (v4jax layout --measure writes one)",
    )
    parser.add_argument(
        "--cases",
        nargs="*",
        default=CASES,
        choices=CASES,
        metavar="CASE",
        help="layouts to compile or to time",
    )
    parser.add_argument("--compile", action="store_true", help="compile only, into the cache")
    parser.add_argument(
        "--cache",
        default=pathlib.Path(tempfile.gettempdir()) / "v4jax-layout-order",
        help="where compiled programs stay",
    )
    arguments = parser.parse_args()
    import jax

    from sharding.mesh import simulate_devices

    simulate_devices(8)
    jax.config.update("jax_compilation_cache_dir", str(arguments.cache))
    cache = pathlib.Path(arguments.cache)
    if arguments.compile:
        for case in arguments.cases:
            prepared(config(case))
            print(f"{case} is compiled", flush=True)
        return
    if arguments.turns and len(arguments.cases) > 1:
        for case in arguments.cases:
            command = [
                sys.executable,
                __file__,
                "--turns",
                str(arguments.turns),
                "--cases",
                case,
                "--cache",
                str(cache),
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            print(f"{case} is timed", flush=True)
        arguments.turns = 0
    from v4jax.planner.estimate import estimate
    from v4jax.planner.hardware import hardware_of

    file = cache / "times.json"
    took = json.loads(file.read_text()) if file.exists() else {}
    if arguments.turns:
        (case,) = arguments.cases
        took[case] = min(fastest_step(config(case), arguments.turns), took.get(case, float("inf")))
        file.write_text(json.dumps(took))
    paper = {case: estimate(config(case), hardware_of(arguments.profile)) for case in CASES}
    print(
        "| layout: mesh | estimated ms | measured ms | measured / estimated | bound by |\n"
        "|---|---|---|---|---|"
    )
    for case in sorted(CASES, key=lambda case: paper[case].step_seconds):
        ms, real = paper[case].step_seconds * 1e3, took.get(case, float("nan")) * 1e3
        print(f"| {case} | {ms:.0f} | {real:.0f} | {real / ms:.2f} | {paper[case].bound} |")
    print(
        f"\nKendall's tau: "
        f"{kendall([paper[c].step_seconds for c in took], [took[c] for c in took]):.2f} over "
        f"{len(took)} layouts"
        if len(took) > 1
        else ""
    )


def config(case: str):
    from configs import demo

    layout, _, mesh = case.partition(":")
    model = demo.get_model().replace(
        num_hidden_layers=2, num_hash_layers=0, num_nextn_predict_layers=0, compress_ratios=(4, 128)
    )
    return dataclasses.replace(
        demo.get_config(), model=model, batch_size=8, mesh=mesh, layout=layout
    )


def fastest_step(cfg, turns: int) -> float:
    """Seconds of the fastest of `turns` steps, after one to warm up."""
    import jax

    (mesh, step, state, batch), best = prepared(cfg), float("inf")
    for turn in range(turns + 1):
        with jax.set_mesh(mesh):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
        best = min(best, time.perf_counter() - start) if turn else best
    return best


def prepared(cfg):
    """(mesh, compiled step, state, batch)."""
    import jax
    import numpy as np

    from sharding.mesh import make_mesh, parse_mesh
    from sharding.rules import layout_for
    from v4jax.train.step import batch_sharding, compile_step, init_state, state_shardings

    sizes = parse_mesh(cfg.mesh)
    mesh, rules = make_mesh(sizes), layout_for(cfg.layout, sizes)
    with jax.set_mesh(mesh):
        places = state_shardings(cfg, rules, mesh)
        state = init_state(cfg, places)
        tokens = np.random.default_rng(0).integers(
            0, cfg.model.vocab_size, (cfg.batch_size, cfg.seq_len), dtype=np.int32
        )
        batch = jax.device_put(
            {"tokens": tokens, "segment_ids": np.ones_like(tokens)}, batch_sharding(rules, mesh)
        )
        return (
            mesh,
            compile_step(cfg, rules, places, mesh).lower(state, batch).compile(),
            state,
            batch,
        )


def kendall(a: list[float], b: list[float]) -> float:
    """(pairs in the same order - pairs in the other) / pairs."""
    pairs = list(itertools.combinations(range(len(a)), 2))
    return sum(1 if (a[i] - a[j]) * (b[i] - b[j]) > 0 else -1 for i, j in pairs) / len(pairs)


if __name__ == "__main__":
    main()
