"""How much asynchronous saves slow training: the time that a save takes from the steps beside it.

    python benchmarks/save_stall.py [--steps 20] [--rounds 5]

Each round saves the whole state (weights, router, Muon and AdamW state), which Orbax writes while
further steps run. The cost of a save is its call, plus what the steps until it is on the disk take
above the median of the later steps of the same round. So the drift of the machine from minute to
minute does not drown it. A save must be on the disk before the last third of its round. On a
machine without accelerators the writing threads take cores from the steps: the worst case.
"""

import argparse
import dataclasses
import pathlib
import shutil
import sys
import tempfile
import time

import jax
import numpy as np
from train_step import MODEL

from sharding.mesh import make_mesh, parse_mesh, simulate_devices
from sharding.rules import AxisRules
from v4jax.checkpoint.store import Store
from v4jax.train.config import TrainConfig
from v4jax.train.step import compile_step, init_state, state_shardings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=20, help="steps of a round: what lies between two saves"
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    simulate_devices(1)
    model = dataclasses.replace(
        MODEL, num_nextn_predict_layers=1, compress_ratios=(*MODEL.compress_ratios, 0)
    )
    cfg = TrainConfig(
        model=model,
        run_dir="",
        steps=10**6,
        batch_size=8,
        seq_len=256,
        learning_rate=1e-4,
        warmup_steps=0,
    )
    mesh, rules = make_mesh(parse_mesh("")), AxisRules()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="v4jax-stall-"))
    try:
        with jax.set_mesh(mesh), Store(folder, keep=1, writes=True) as store:
            shardings = state_shardings(cfg, rules, mesh)
            step, state = compile_step(cfg, rules, shardings, mesh), init_state(cfg, shardings)
            tokens = np.random.default_rng(0).integers(
                2, model.vocab_size, (cfg.batch_size, cfg.seq_len), np.int32
            )
            batch = {
                "tokens": jax.numpy.asarray(tokens),
                "segment_ids": jax.numpy.ones_like(tokens),
            }
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            costs, calls, plain, until = [], [], [], []
            for i in range(arguments.rounds + 1):
                begin = time.perf_counter()
                if i:  # the first round compiles
                    store.save(i, {"params": state.public, "optimizer": state.optimizer})
                call, times, beside = time.perf_counter() - begin, [], 0
                for _ in range(arguments.steps):
                    start = time.perf_counter()
                    state, metrics = step(state, batch)
                    jax.block_until_ready(metrics)
                    times.append(time.perf_counter() - start)
                    # A step that began before the save was done runs beside it.
                    beside = beside or (
                        len(times) if (store.path(i) / "checksums.json").exists() else 0
                    )
                print(
                    f"round {i} of {arguments.rounds}, {time.perf_counter() - begin:.0f} s",
                    file=sys.stderr,
                )
                if i:
                    if not 0 < beside <= arguments.steps * 2 / 3:
                        sys.exit(
                            f"save {i} was not on the disk after two thirds of its "
                            f"{arguments.steps} steps: give more --steps"
                        )
                    usual = float(np.median(times[beside:]))
                    costs.append(call + sum(times[:beside]) - beside * usual)
                    calls.append(call)
                    plain.append(usual)
                    until.append(beside)
    finally:
        shutil.rmtree(folder)
    cost, usual = float(np.median(costs)), float(np.median(plain))
    print(
        "| state | save call | steps beside it | a save costs (least to most) | step | stall, "
        "saving every so many steps | bar |\n|---|---|---|---|---|---|---|"
    )
    print(
        f"| {size / 1e6:.0f} MB | {np.median(calls) * 1e3:.0f} ms | {max(until)} | "
        f"{cost * 1e3:.0f} ms ({min(costs) * 1e3:.0f} to {max(costs) * 1e3:.0f}) "
        f"| {usual * 1e3:.0f} ms | {arguments.steps}: {cost / (usual * arguments.steps):+.1%} | "
        f"5% |"
    )


if __name__ == "__main__":
    main()
