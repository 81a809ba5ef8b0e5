"""Memory of every remat policy, and of micro-batches, estimated beside compiled programs.

    python benchmarks/remat_accuracy.py run [CASE ...]     # needs the extra `tpu`; minutes a case
    python benchmarks/remat_accuracy.py table

Four layers as wide as V4-Flash's with 64 experts, on 8 v5p chips (`pod`, fsdp=2, expert=4), a row
of 4096 tokens a chip at a time, compiled with quick effort; under `none` also six layers, which are
a loop. Bar: 10%. Results are appended to a file; the last result of a case counts.
tests/test_memory_record.py holds the estimate to it.
"""

import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

RESULTS = pathlib.Path(__file__).parent / "remat_accuracy.jsonl"
TARGET = "v5p:2x2x2"
CASES = {  # name: (policy, micro-batches, what else differs)
    "layer-1": ("layer", 1, {}),
    "layer-4": ("layer", 4, {}),
    "layer-8": ("layer", 8, {}),
    "none-1": ("none", 1, {}),
    "none-deep-1": ("none", 1, {"layers": 6}),
    "attention-1": ("attention", 1, {}),
    "experts-1": ("experts", 1, {}),
    "dots-1": ("dots", 1, {}),
    "dots-4": ("dots", 4, {}),
    "offload-1": ("offload", 1, {}),
    "offload-4": ("offload", 4, {}),
    "optimizer-host-4": ("layer", 4, {"optimizer_memory": "host"}),
}


def config(name: str):
    """The training configuration of a case."""
    from configs import models
    from v4jax.train.config import TrainConfig

    remat, count, more = CASES[name]
    layers = more.get("layers", 4)
    model = models.flash().replace(
        num_hidden_layers=layers,
        num_hash_layers=0,
        num_nextn_predict_layers=0,
        compress_ratios=(4, 128) * (layers // 2),
        n_routed_experts=64,
    )
    return TrainConfig(
        model=model,
        run_dir="",
        mesh="fsdp=2,expert=4",
        layout="pod",
        steps=1,
        batch_size=8 * count,
        gradient_accumulation=count,
        seq_len=4096,
        learning_rate=1e-4,
        warmup_steps=0,
        dtype="bfloat16",
        remat=remat,
        optimizer_memory=more.get("optimizer_memory", "device"),
    )


def run(name: str) -> None:
    """Compiles one case and appends its result."""
    from v4jax.planner.compiled import report_layout

    report = dataclasses.asdict(report_layout(config(name), TARGET))
    fields = ("state_bytes", "temporary_bytes", "host_bytes", "compile_seconds")
    row = {"case": name} | {field: report[field] for field in fields}
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def recorded() -> dict[str, tuple[dict, Any]]:
    """Case -> (what compiling found, today's Estimate)."""
    from v4jax.planner.estimate import estimate
    from v4jax.planner.hardware import target_of

    rows = {row["case"]: row for row in map(json.loads, RESULTS.read_text().splitlines())}
    hardware = target_of(TARGET).hardware
    return {name: (rows[name], estimate(config(name), hardware)) for name in CASES if name in rows}


def table() -> None:
    """Prints every case that was run."""
    print("| remat | micro-batches | state | temporary | together | estimated | ratio | host |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (row, found) in recorded().items():
        remat, count, more = CASES[name]
        state, temporary = row["state_bytes"], row["temporary_bytes"]
        sizes = (state, temporary, state + temporary, found.memory_bytes)
        shown = " | ".join(f"{size / 1e9:.2f} GB" for size in sizes)
        host = f"{row['host_bytes'] / 1e9:.2f} GB, {sum(found.host.values()) / 1e9:.2f}"
        what = remat + "".join(f", {key}={value}" for key, value in more.items())
        ratio = found.memory_bytes / (state + temporary)
        print(f"| {what} | {count} | {shown} | {ratio:.2f} | {host} |")


def main() -> None:
    command, names = (sys.argv[1:] or ["table"])[0], sys.argv[2:]
    if command not in ("run", "table") or set(names) - CASES.keys():
        raise SystemExit(
            f"usage: remat_accuracy.py run [CASE ...] | table; cases: {', '.join(CASES)}"
        )
    if command == "run":
        os.environ["JAX_PLATFORMS"] = "cpu"
        for name in names or CASES:
            run(name)
    table()


if __name__ == "__main__":
    main()
