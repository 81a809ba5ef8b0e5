"""What each part of the recipe is worth: equal-token runs on the standard library's sources, three seeds, held-out nats per byte.

    python benchmarks/recipe.py                    # runs what is missing, then writes docs/recipe.md and docs/recipe.png
    python benchmarks/recipe.py --budget 240       # starts no run after so many seconds: finish it in several sittings
    python benchmarks/recipe.py --report           # only the table and the picture of what has been run

Every finished run is a line of docs/recipe.json, so the script goes on where it stopped. The model is the demo's, smaller: one
device, every mechanism on. All runs train the main model for the same number of steps of the same size at a constant learning rate.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import tempfile
import time
from unittest import mock

import numpy as np

from v4jax.config import CSA, HCA, WINDOW_ONLY, ModelConfig, RopeScaling
from v4jax.data.config import DataConfig
from v4jax.train.config import TrainConfig
from v4jax.train.loop import train
from v4jax.train.report import read_metrics
from v4jax.train.stages import Stage

ROOT = pathlib.Path(__file__).parent.parent
RESULTS, TABLE, PICTURE = (ROOT / "docs" / f"recipe.{kind}" for kind in ("json", "md", "png"))
SEEDS = (0, 1, 2)
STEPS, DENSE, ALONE = 160, 100, 20
"""Steps of the main model; after so many of them attention becomes sparse; steps in which the indexer learns alone."""

MODEL = ModelConfig(
    vocab_size=264, hidden_size=64, moe_intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=32,
    qk_rope_head_dim=16, q_lora_rank=32, o_groups=2, o_lora_rank=32, n_routed_experts=8, num_experts_per_tok=2,
    routed_scaling_factor=1.5, compress_ratios=(WINDOW_ONLY, CSA, HCA, CSA, WINDOW_ONLY), num_hash_layers=1, sliding_window=16,
    index_n_heads=4, index_head_dim=32, index_topk=8, compress_rope_theta=160000.0, rope_scaling=RopeScaling(),
)  # fmt: skip
BASE = TrainConfig(
    model=MODEL, run_dir="", steps=STEPS, batch_size=8, seq_len=256, learning_rate=4e-3, warmup_steps=20, log_every=5, eval_every=10**6,
    eval_batches=16, checkpoint_every=10**6, keep=1, remat=False, export="none", attention="dense",
)  # fmt: skip
_SPARSE = (Stage(after=DENSE, attention="indexer"), Stage(after=DENSE + ALONE, attention="sparse"))
VARIANTS = {
    "all on, dense attention": BASE,
    "AdamW for every matrix": BASE,
    "plain residual (hc_mult 1)": dataclasses.replace(BASE, model=MODEL.replace(hc_mult=1)),
    "without MTP": dataclasses.replace(
        BASE, model=MODEL.replace(num_nextn_predict_layers=0, compress_ratios=MODEL.compress_ratios[:-1])
    ),
    "sparse, trained indexer": dataclasses.replace(BASE, steps=STEPS + ALONE, index_learning_rate=4e-3, stages=_SPARSE),
    "sparse, untrained indexer": dataclasses.replace(BASE, stages=(Stage(after=DENSE, attention="sparse"),)),
    "QAT": dataclasses.replace(BASE, quant="official"),
    "no bias update": dataclasses.replace(BASE, bias_rate=0.0),
}
"""Each differs from the first in what its name says."""


def run(name: str, seed: int) -> dict:
    """One run: held-out nats per byte, the mean of max/mean expert load over its last quarter, seconds."""
    optimizer = mock.patch("v4jax.train.muon.optimizer_of", lambda path, trains_index=False: "frozen" if "indexer" in path else "adamw")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, optimizer if name.startswith("AdamW") else contextlib.nullcontext():
        cfg = VARIANTS[name]
        summary = train(dataclasses.replace(cfg, run_dir=folder, seed=seed, data=DataConfig(seed=seed)))
        lines = [line for line in read_metrics(folder) if line["step"] > 0.75 * cfg.steps and "expert_load_mean" in line]
    result = {"name": name, "seed": seed, "held_out_nll": summary["held_out_nll"], "seconds": time.perf_counter() - start}
    result["load"] = float(np.mean([line["expert_load_mean"] for line in lines]))
    return result | ({"captured": lines[-1]["index_captured"]} if "index_captured" in lines[-1] else {})


def results() -> list[dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def report() -> None:
    """The table, and a picture of every run."""
    from matplotlib.figure import Figure

    found = {name: [line for line in results() if line["name"] == name] for name in VARIANTS}
    found = {name: lines for name, lines in found.items() if lines}
    base = {line["seed"]: line["held_out_nll"] for line in results() if line["name"] == next(iter(VARIANTS))}
    rows = ["| run | held out, nats per byte: mean (least to most) | against the first, seed by seed | max/mean load | seeds |", "|---|---|---|---|---|"]
    for name, lines in found.items():
        nll = np.array([line["held_out_nll"] for line in lines])
        gap = [f"{line['held_out_nll'] - base[line['seed']]:+.3f}" for line in lines if line["seed"] in base]
        load = np.mean([line["load"] for line in lines])
        rows.append(f"| {name} | {nll.mean():.3f} ({nll.min():.3f} to {nll.max():.3f}) | {', '.join(gap)} | {load:.2f} | {len(lines)} |")
    print("\n".join(rows))
    head = TABLE.read_text().split("<!-- table -->")[0] if TABLE.exists() else "# The recipe, part by part\n\n"
    tail = TABLE.read_text().split("<!-- end -->")[1] if TABLE.exists() else "\n"
    TABLE.write_text(head + "<!-- table -->\n" + "\n".join(rows) + "\n<!-- end -->" + tail)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for y, (name, lines) in enumerate(found.items()):
        axes.plot([line["held_out_nll"] for line in lines], [y] * len(lines), "o", alpha=0.7)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel("held-out nats per byte, a dot per seed (less is better)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no run is started")
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    start = time.perf_counter()
    done = {(line["name"], line["seed"]) for line in results()}
    todo = [] if arguments.report else [(name, seed) for seed in SEEDS for name in VARIANTS if (name, seed) not in done]
    for name, seed in todo:
        if time.perf_counter() - start > arguments.budget:
            break
        lines = [*results(), run(name, seed)]
        RESULTS.write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")
    report()


if __name__ == "__main__":
    main()
