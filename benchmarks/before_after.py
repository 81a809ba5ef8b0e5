"""Times of this tree beside those of another commit, alternating in one run.

    git worktree add /tmp/before COMMIT
    python benchmarks/before_after.py /tmp/before [--rounds N]

Cases: a training step of the demo's model on one device and on 8 simulated ones, a forward pass of
16K tokens, and decoding 192 tokens at batch 1 and 8. Each tree runs in a process of its own, one
waits while the other works. The table shows medians, and the median of the rounds' ratios.
"""

import argparse
import dataclasses
import os
import pathlib
import statistics
import subprocess
import sys
import time

CASES = ("train", "mesh", "length", "decode 1", "decode 8")


def work(case: str):
    """A function that does the case once, from whichever tree is on the path."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import v4jax
    from configs import demo
    from sharding.mesh import make_mesh, parse_mesh
    from sharding.rules import AxisRules, layout_for
    from v4jax.train.step import batch_sharding, compile_step, init_state, state_shardings

    cfg, rng = demo.get_config(), np.random.default_rng(0)
    if case in ("train", "mesh"):
        cfg = dataclasses.replace(cfg, mesh=cfg.mesh if case == "mesh" else "")
        sizes = parse_mesh(cfg.mesh)
        mesh, rules = make_mesh(sizes), layout_for("full", sizes) if cfg.mesh else AxisRules()
        jax.set_mesh(mesh)
        places = state_shardings(cfg, rules, mesh)
        tokens = rng.integers(0, 280, (cfg.batch_size, cfg.seq_len)).astype(np.int32)
        batch = {"tokens": jax.device_put(tokens, batch_sharding(rules, mesh))}
        state = [init_state(cfg, places)]
        step = compile_step(cfg, rules, places, mesh).lower(state[0], batch).compile()

        def train() -> None:
            state[0] = jax.block_until_ready(step(state[0], batch)[0])

        return train
    params = v4jax.init_params(cfg.model, jax.random.key(0))
    if case == "length":
        tokens = jnp.asarray(rng.integers(0, 280, (1, 16384)).astype(np.int32))
        return lambda: jax.block_until_ready(v4jax.forward(cfg.model, params, tokens).logits)
    from v4jax.generate.decode import generate

    prompts = [rng.integers(0, 280, 64).tolist() for _ in range(int(case.split()[1]))]
    return lambda: generate(cfg.model, params, prompts, 192, stop=lambda *_: False)


def serve(case: str) -> None:
    """Warms up, then does the case once for every line of standard input."""
    run = work(case)
    run()
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, flush=True)


def started(tree: str, case: str) -> subprocess.Popen:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, str(pathlib.Path(__file__).resolve()), "--serve", case],
        cwd=tree,
        env=os.environ | flags | {"PYTHONPATH": tree},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    if process.stdout.readline() != "ready\n":
        sys.exit(f"{tree}: {case} did not start")
    return process


def compare(before: str, rounds: int) -> None:
    here = str(pathlib.Path(__file__).resolve().parent.parent)
    print(f"{'case':>9} {'before':>9} {'now':>9} {'ratio':>6}")
    for case in CASES:
        pair, found = [started(tree, case) for tree in (before, here)], []
        for n in range(rounds):
            seconds = {}
            for place in (0, 1) if n % 2 else (1, 0):
                pair[place].stdin.write("\n")
                pair[place].stdin.flush()
                seconds[place] = float(pair[place].stdout.readline())
            found.append((seconds[0], seconds[1]))
        for process in pair:
            process.stdin.close()
            process.wait()
        old, new = (statistics.median(times) for times in zip(*found, strict=True))
        ratio = statistics.median(b / a for a, b in found)
        print(f"{case:>9} {old:8.3f}s {new:8.3f}s {ratio:6.3f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", nargs="?", help="a checkout of the other commit")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--serve", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
    elif arguments.before is None:
        parser.error("name a checkout of the commit to compare with")
    else:
        compare(str(pathlib.Path(arguments.before).resolve()), arguments.rounds)
