"""What each part of the recipe is worth: equal-token runs of a model of the demo's size.

    python benchmarks/recipe.py                  # the missing runs; docs/recipe.md and recipe.png
    python benchmarks/recipe.py --budget 240     # starts no run after so many seconds
    python benchmarks/recipe.py --side-by-side   # a process per variant, which fills a GPU better
    python benchmarks/recipe.py --report         # only the table and the picture of finished runs

Data are the standard library's sources, with three seeds; the measure is held-out nats per byte.
Every finished run is a line of docs/recipe.jsonl (or --results), so the script continues where it
stopped. All runs train the main model for the same number of steps of the same size; the learning
rate falls over the last of them.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from unittest import mock

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from configs import demo
from sharding.mesh import simulate_devices
from v4jax.data.config import DataConfig
from v4jax.functional import init_params
from v4jax.parameter_tree import spec_of
from v4jax.train import loop, run_steps
from v4jax.train.config import TrainConfig
from v4jax.train.metrics_file import read_metrics
from v4jax.train.stages import Stage

DOCS = pathlib.Path(__file__).parent.parent / "docs"
RESULTS, TABLE, PICTURE = DOCS / "recipe.jsonl", DOCS / "recipe.md", DOCS / "recipe.png"
SEEDS = (0, 1, 2)
STEPS, DENSE, ALONE = 300, 180, 40
"""Steps of the main model; steps before attention becomes sparse; steps of the indexer alone."""

# The window is short and few entries are chosen of many (8 of 128), so that the choice matters.
MODEL = demo.get_model().replace(sliding_window=16, index_topk=8)
BASE = TrainConfig(
    model=MODEL,
    run_dir="",
    steps=STEPS,
    batch_size=8,
    seq_len=512,
    learning_rate=4e-3,
    warmup_steps=20,
    decay_steps=100,
    log_every=5,
    eval_every=10**6,
    eval_batches=32,
    checkpoint_every=10**6,
    keep=1,
    remat="none",
    export="none",
    attention="dense",
)
_SPARSE = (Stage(after=DENSE, attention="indexer"), Stage(after=DENSE + ALONE, attention="sparse"))
VARIANTS = {
    "all on, dense attention": BASE,
    "AdamW for every matrix": BASE,
    "plain residual (hc_mult 1)": dataclasses.replace(BASE, model=MODEL.replace(hc_mult=1)),
    "without MTP": dataclasses.replace(
        BASE,
        model=MODEL.replace(num_nextn_predict_layers=0, compress_ratios=MODEL.compress_ratios[:-1]),
    ),
    "sparse, trained indexer": dataclasses.replace(
        BASE, steps=STEPS + ALONE, index_learning_rate=4e-3, stages=_SPARSE
    ),
    "sparse, untrained indexer": dataclasses.replace(
        BASE, stages=(Stage(after=DENSE, attention="sparse"),)
    ),
    "QAT": dataclasses.replace(BASE, quant="official"),
    "no bias update": dataclasses.replace(BASE, bias_rate=0.0),
}
"""Each run differs from the first in what its name says."""


def also_with_a_new_indexer(evaluator, held_out: list[float]):
    """`evaluator`, measuring each time the weights with an untrained indexer too.

    That loss is added to `held_out`.
    """

    def make(cfg: TrainConfig, *rest):
        evaluate = evaluator(cfg, *rest)

        def both(params, batches):
            new = init_params(cfg.model, jax.random.key(cfg.seed + 1))

            def choose(path, old, new):
                part = spec_of(tuple(key.key for key in path)).part
                return new if part == "indexer" else old

            mixed = jax.tree_util.tree_map_with_path(choose, params, new)
            held_out.append(evaluate(mixed, batches)["nll"])
            return evaluate(params, batches)

        return both

    return make


def run(name: str, seed: int) -> dict:
    """Results of one run.

    They are held-out nats per byte (also with a new indexer, if one was trained), the mean of
    max/mean expert load over the last quarter, and seconds.
    """
    optimizer = mock.patch(
        "v4jax.train.muon.optimizer_of",
        lambda path, trains_index=False: "frozen" if spec_of(path).part == "indexer" else "adamw",
    )
    start, new_indexer = time.perf_counter(), []
    evaluator = mock.patch.object(
        run_steps, "evaluator", also_with_a_new_indexer(run_steps.evaluator, new_indexer)
    )
    cfg, plain = VARIANTS[name], contextlib.nullcontext()
    with (
        tempfile.TemporaryDirectory() as folder,
        evaluator if cfg.index_learning_rate else plain,
        optimizer if name.startswith("AdamW") else plain,
    ):
        summary = loop.train(
            dataclasses.replace(cfg, run_dir=folder, seed=seed, data=DataConfig(seed=seed))
        )
        if "stopped_at" in summary:
            raise SystemExit(
                f"stopped at step {summary['stopped_at']} of {name}, seed {seed}; finished runs "
                f"are kept, start again to go on"
            )
        lines = [
            line
            for line in read_metrics(folder)
            if line["step"] > 0.75 * cfg.steps and "expert_load_mean" in line
        ]
    result = {
        "name": name,
        "seed": seed,
        "held_out_nll": summary["held_out_nll"],
        "seconds": time.perf_counter() - start,
    }
    result["load"] = float(np.mean([line["expert_load_mean"] for line in lines]))
    captured = {"captured": lines[-1]["index_captured"]} if "index_captured" in lines[-1] else {}
    return result | captured | ({"new_indexer_nll": new_indexer[-1]} if new_indexer else {})


def results(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_missing(path: pathlib.Path, names: list[str], seeds: list[int], budget: float) -> None:
    """Adds a line to `path` for each variant and seed that it lacks."""
    start = time.perf_counter()
    for name, seed in [(name, seed) for seed in seeds for name in names]:
        if any(
            (line["name"], line["seed"]) == (name, seed) for line in results(path)
        ):  # another process may have run it meanwhile
            continue
        if time.perf_counter() - start > budget:
            break
        line = json.dumps(run(name, seed)) + "\n"
        with open(
            path, "a"
        ) as file:  # one write, so that processes do not cut into each other's lines
            file.write(line)


def run_side_by_side(path: pathlib.Path, budget: float) -> None:
    """Starts a process of this script for each variant.

    They share the accelerator, and its memory as they need it.
    """
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, __file__, "--results", str(path), "--budget", str(budget), "--only"]
    logs = [tempfile.TemporaryFile("w+") for _ in VARIANTS]  # noqa: SIM115
    pairs = zip(VARIANTS, logs, strict=True)
    processes = [
        subprocess.Popen([*command, name], env=environment, stdout=log, stderr=subprocess.STDOUT)
        for name, log in pairs
    ]
    for name, process, log in zip(VARIANTS, processes, logs, strict=True):
        if process.wait():
            log.seek(0)
            print(f"{name}: failed\n{log.read()[-2000:]}", file=sys.stderr)


def report(path: pathlib.Path) -> None:
    """Writes the table and a picture of every run."""
    from matplotlib.figure import Figure

    found = {name: [line for line in results(path) if line["name"] == name] for name in VARIANTS}
    swapped = [
        line | {"held_out_nll": line["new_indexer_nll"]}
        for line in results(path)
        if "new_indexer_nll" in line
    ]
    found["trained, then a new indexer"] = swapped
    found = {name: lines for name, lines in found.items() if lines}
    base = {
        line["seed"]: line["held_out_nll"]
        for line in results(path)
        if line["name"] == next(iter(VARIANTS))
    }
    rows = [
        "| run | held out, nats per byte: mean (least to most) | against the first, seed by "
        "seed | mean | max/mean load |",
        "|---|---|---|---|---|",
    ]
    for name, lines in found.items():
        nll = np.array([line["held_out_nll"] for line in lines])
        gap = [
            line["held_out_nll"] - base[line["seed"]]
            for line in sorted(lines, key=lambda line: line["seed"])
            if line["seed"] in base
        ]
        load = np.mean([line["load"] for line in lines])
        each = ", ".join(f"{one:+.3f}" for one in gap)
        rows.append(
            f"| {name} | {nll.mean():.3f} ({nll.min():.3f} to {nll.max():.3f}) | {each} | "
            f"{np.mean(gap):+.3f} | {load:.2f} |"
        )
    print("\n".join(rows))
    head, rest = TABLE.read_text().split("<!-- table -->")
    TABLE.write_text(
        head
        + "<!-- table -->\n"
        + "\n".join(rows)
        + "\n<!-- end -->"
        + rest.split("<!-- end -->")[1]
    )
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    # Held-out data differ by seed, so only runs of one seed compare.
    for y, lines in enumerate(found.values()):
        gap = [line["held_out_nll"] - base[line["seed"]] for line in lines if line["seed"] in base]
        axes.plot(gap, [y] * len(gap), "o", alpha=0.7)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xscale(
        "symlog", linthresh=0.05, linscale=3
    )  # one of them is ten times as far away as the others
    axes.set_xlim(right=0.7)
    axes.set_xticks([-0.02, 0, 0.02, 0.04, 0.1, 0.4], ["-0.02", "0", "0.02", "0.04", "0.1", "0.4"])
    axes.set_xlabel("held-out nats per byte above the first of the same seed")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which no run is started"
    )
    parser.add_argument("--only", choices=VARIANTS, help="this variant alone; no report")
    parser.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, default=SEEDS)
    parser.add_argument(
        "--side-by-side", action="store_true", help="all variants at once, a process each"
    )
    parser.add_argument(
        "--results", type=pathlib.Path, default=RESULTS, help="file of finished runs"
    )
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    simulate_devices(1)  # as the command line does
    if arguments.side_by_side:
        run_side_by_side(arguments.results, arguments.budget)
    elif not arguments.report:
        run_missing(
            arguments.results,
            [arguments.only] if arguments.only else list(VARIANTS),
            arguments.seeds,
            arguments.budget,
        )
    if not arguments.only:
        report(arguments.results)


if __name__ == "__main__":
    main()
