"""What each part of the recipe costs: time of a training step with it and without.

    python benchmarks/recipe_overheads.py

Steps with and without the part alternate, so that a noisy machine disturbs both; the table shows
medians and their ratio. The floor is the ratio of multiply-adds (v4jax/cost.py). Rounding (QAT) and
the indexer's divergence add none that it counts, so their floor is 1.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import numpy as np
from recipe import BASE, MODEL

from sharding.mesh import make_mesh, parse_mesh, simulate_devices
from sharding.rules import AxisRules
from v4jax.cost import train_flops_per_token
from v4jax.train.config import TrainConfig
from v4jax.train.step import compile_step, init_state, state_shardings

SPARSE = dataclasses.replace(BASE, attention="sparse")
WITHOUT_MTP = MODEL.replace(num_nextn_predict_layers=0, compress_ratios=MODEL.compress_ratios[:-1])
PAIRS = {
    "MTP": (dataclasses.replace(SPARSE, model=WITHOUT_MTP), SPARSE),
    "mHC (4 streams against 1)": (
        dataclasses.replace(SPARSE, model=MODEL.replace(hc_mult=1)),
        SPARSE,
    ),
    "indexer learning, sparse": (SPARSE, dataclasses.replace(SPARSE, index_learning_rate=1e-3)),
    "QAT": (SPARSE, dataclasses.replace(SPARSE, quant="official")),
}
"""Part -> (without, with)."""


def stepper(cfg: TrainConfig):
    """A function that does one step and waits for it."""
    mesh = make_mesh(parse_mesh(""))
    with jax.set_mesh(mesh):
        places = state_shardings(cfg, AxisRules(), mesh)
        held = [init_state(cfg, places)]
        tokens = (
            np.random.default_rng(0)
            .integers(0, cfg.model.vocab_size, (cfg.batch_size, cfg.seq_len))
            .astype(np.int32)
        )
        batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens)}
        step = compile_step(cfg, AxisRules(), places, mesh).lower(held[0], batch).compile()

    def once() -> float:
        start = time.perf_counter()
        held[0], _ = jax.block_until_ready(step(held[0], batch))
        return time.perf_counter() - start

    return once


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    simulate_devices(1)  # as the command line does
    print("| part | step without | with | ratio | floor |\n|---|---|---|---|---|")
    for name, pair in PAIRS.items():
        steps = [stepper(cfg) for cfg in pair]
        times = [[step() for step in steps] for _ in range(rounds + 2)][2:]
        off, on = (statistics.median(column) for column in zip(*times, strict=True))
        flops = [train_flops_per_token(cfg.model, cfg.seq_len) for cfg in pair]
        print(
            f"| {name} | {off * 1e3:.0f} ms | {on * 1e3:.0f} ms | {on / off:.2f} | "
            f"{flops[1] / flops[0]:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
