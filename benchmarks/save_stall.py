"""How much asynchronous saves slow training: the same steps with and without saves under way.

    python benchmarks/save_stall.py [--steps 20] [--rounds 3]

Stretches of steps alternate: one that begins with a save of the whole state (weights, router, Muon and AdamW state), which Orbax writes while the
steps go on, and one without. The table shows the time of the call itself, the mean step of both and their ratio; the save must be done before
its stretch ends, or the row says so. On a machine without accelerators the writing threads take cores from the steps: the worst case.
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
    parser.add_argument("--steps", type=int, default=20, help="steps of a stretch: what lies between two saves")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    simulate_devices(1)
    model = dataclasses.replace(MODEL, num_nextn_predict_layers=1, compress_ratios=(*MODEL.compress_ratios, 0))
    cfg = TrainConfig(model=model, run_dir="", steps=10**6, batch_size=8, seq_len=256, learning_rate=1e-4, warmup_steps=0)
    mesh, rules = make_mesh(parse_mesh("")), AxisRules()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="v4jax-stall-"))
    try:
        with jax.set_mesh(mesh), Store(folder, keep=1, writes=True) as store:
            shardings = state_shardings(cfg, rules, mesh)
            step, state = compile_step(cfg, rules, shardings, mesh), init_state(cfg, shardings)
            tokens = np.random.default_rng(0).integers(2, model.vocab_size, (cfg.batch_size, cfg.seq_len), np.int32)
            batch = {"tokens": jax.numpy.asarray(tokens), "segment_ids": jax.numpy.ones_like(tokens)}
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            times = {True: [], False: []}
            calls, late = [], 0
            for i in range(2 * arguments.rounds + 1):
                saving, begin = i % 2 == 0 and i > 0, time.perf_counter()
                if saving:
                    store.save(i, {"params": state.public, "optimizer": state.optimizer})
                    calls.append(time.perf_counter() - begin)
                for _ in range(arguments.steps):
                    state, metrics = step(state, batch)
                    jax.block_until_ready(metrics)
                print(f"stretch {i} of {2 * arguments.rounds}, {time.perf_counter() - begin:.0f} s", file=sys.stderr)
                if i:  # the first stretch compiles
                    times[saving].append((time.perf_counter() - begin) / arguments.steps)
                late += saving and not (store.path(i) / "checksums.json").exists()
    finally:
        shutil.rmtree(folder)
    without, with_ = (float(np.median(times[saving])) for saving in (False, True))
    print("| state | save call | step without | step with a save | stall | bar |\n|---|---|---|---|---|---|")
    print(f"| {size / 1e6:.0f} MB, every {arguments.steps} steps | {np.median(calls) * 1e3:.0f} ms | {without * 1e3:.0f} ms | {with_ * 1e3:.0f} ms "
          f"| {with_ / without - 1:+.1%} | 5% |")  # fmt: skip
    if late:
        sys.exit(f"{late} saves were not done when their stretch ended: give more --steps")


if __name__ == "__main__":
    main()
