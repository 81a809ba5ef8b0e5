"""The estimate beside compiled programs: bytes of a device that are kept and sent.

    python benchmarks/layout_accuracy.py run tpu-fsdp cpu-full ...   # without names: all of NAMES
    python benchmarks/layout_accuracy.py table

Cases other than cpu- need the extra `tpu` or `gpu`. Bars: weights and optimizer, all memory, and
bytes sent within 10%. "All memory" is not compared for CPUs: XLA:CPU plans temporary memory for no
device that exists. The config- cases are configurations as shipped, in their first stage; the lora-
cases are those of adapters, in one micro-batch. pods.py compiles the full models and keeps its
results here; the other cases have Flash's pattern with fewer and narrower layers. Results are
appended to a file, so that cases can run one by one; the last result of a case counts. TPU cases
compile with quick effort, the default of `v4jax layout`.
tests/test_memory_record.py holds the estimate to the file.
"""

import dataclasses
import importlib
import json
import math
import os
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from pods import CASES as PODS
from pods import RESULTS, keep, pod_config

MID = dict(
    hidden_size=2048,
    moe_intermediate_size=1024,
    n_routed_experts=32,
    num_attention_heads=32,
    q_lora_rank=512,
    o_groups=8,
)
SLIM = dict(
    hidden_size=512,
    moe_intermediate_size=256,
    n_routed_experts=32,
    num_attention_heads=16,
    q_lora_rank=256,
    o_groups=8,
    o_lora_rank=128,
    head_dim=128,
    qk_rope_head_dim=64,
    index_n_heads=16,
    index_head_dim=128,
    index_topk=128,
    vocab_size=8192,
)
SMALL = dict(
    hidden_size=256,
    moe_intermediate_size=192,
    n_routed_experts=16,
    num_attention_heads=8,
    q_lora_rank=96,
    o_groups=4,
    o_lora_rank=80,
    head_dim=64,
    qk_rope_head_dim=16,
    index_n_heads=8,
    index_head_dim=32,
    index_topk=64,
    vocab_size=1024,
)
CASES = {  # name: (layers, MTP, sizes, mesh, layout, target, tokens a row, rows, dtype)
    "tpu-fsdp": (4, 0, SLIM, "fsdp=8", "fsdp", "v5p:2x2x2", 2048, 16),
    "tpu-full": (4, 0, SLIM, "fsdp=2,expert=2,tensor=2", "full", "v5p:2x2x2", 2048, 8),
    "tpu-pod": (8, 0, MID, "context=2,expert=2,tensor=2", "pod", "v5p:2x2x2", 8192, 2),
    "tpu-ep": (4, 1, SLIM, "data=2,expert=4", "ep", "v5p:2x2x2", 2048, 16),
    "tpu-v6e": (4, 0, SLIM, "context=4,expert=4", "cp_ep", "v6e:4x4", 4096, 8),
    "tpu-v5e": (8, 0, MID, "data=2,expert=4,tensor=2", "ep_tp", "v5e:4x4", 2048, 8),
    "tpu-7x": (4, 0, SLIM, "fsdp=4,expert=4", "pod", "tpu7x:2x2x2", 2048, 32),
    "tpu-7x-256": (
        4,
        0,
        SLIM | dict(n_routed_experts=128),
        "fsdp=2,expert=128",
        "pod",
        "tpu7x:4x4x8",
        1024,
        256,
    ),
    "tpu-ep-tp": (4, 0, MID, "expert=4,tensor=2", "ep_tp", "v5p:2x2x2", 4096, 8),
    "tpu-cp": (4, 0, SLIM, "context=4,expert=2", "cp_ep", "v5p:2x2x2", 32768, 2),
    "tpu-fsdp-mid": (4, 0, MID, "fsdp=16", "fsdp", "v5p:2x2x4", 4096, 16),
    "tpu-ep-fsdp": (4, 1, MID, "fsdp=4,expert=2", "ep_fsdp", "v5p:2x2x2", 4096, 16),
    "cpu-full": (8, 1, SMALL, "fsdp=2,expert=2,tensor=2", "full", "cpu", 512, 8),
    "cpu-pod": (8, 1, SMALL, "context=2,expert=2,tensor=2", "pod", "cpu", 512, 4),
    "cpu-ep-fsdp": (8, 1, SMALL, "data=2,fsdp=2,expert=2", "ep_fsdp", "cpu", 512, 8),
    "cpu-dp": (4, 0, SMALL, "data=8", "dp", "cpu", 512, 8),
    "cpu-fsdp": (4, 0, SMALL, "fsdp=8", "fsdp", "cpu", 512, 8),
    "cpu-cp": (4, 0, SMALL, "context=4,expert=2", "cp_ep", "cpu", 1024, 4),
    "cpu-ep-tp": (4, 0, SMALL, "expert=4,tensor=2", "ep_tp", "cpu", 512, 8),
    "cpu-pod-8": (4, 0, SMALL, "fsdp=2,expert=4", "pod", "cpu", 512, 8),
}
SHIPPED = {
    "config-flash": ("flash", "v5p:4x4x8"),
    "config-pro": ("pro", "v5p:8x8x8"),
    "config-v5e-8": ("v5e_8", "v5e:2x4"),
    "config-gpu-node": ("gpu_node", "h100:8"),
}
"""Name -> configuration, target."""
ADAPTERS = {
    "lora-flash-h100": ("flash_lora", "h100:8", None, None, 8),
    "lora-flash-v5p": ("flash_lora", "v5p:2x2x2", "fsdp=2,expert=4", None, 8),
    "lora-flash-v6e": ("flash_lora", "v6e:4x8", "context=2,expert=8,tensor=2", "full", 8),
    "lora-pro-h200": ("pro_lora", "h200:16", None, None, 16),
    "lora-pro-v5p": ("pro_lora", "v5p:4x4x2", "data=4,fsdp=8", None, 32),
}
"""Name -> configuration, target, mesh and layout where they differ from its own, rows at once."""
NAMES = (*CASES, *SHIPPED, *ADAPTERS)


def main() -> None:
    command, names = (sys.argv[1:] or ["table"])[0], sys.argv[2:]
    if command not in ("run", "table") or (
        unknown := [name for name in names if name not in NAMES]
    ):
        raise SystemExit(
            f"usage: layout_accuracy.py run [CASE ...] | table; cases: "
            f"{', '.join(NAMES)}; "
            f"unknown: {locals().get('unknown')}"
        )
    if command == "run":
        os.environ["JAX_PLATFORMS"] = "cpu"
        from sharding.mesh import simulate_devices

        simulate_devices(8)
        for name in names or NAMES:
            run(name)
    table()


def config(name: str):
    """The training config of a case and its target."""
    if name in PODS:
        return pod_config(name), PODS[name][1]
    if name in SHIPPED:
        module, target = SHIPPED[name]
        cfg = importlib.import_module(f"configs.{module}").get_config()
        return dataclasses.replace(cfg, stages=()), target
    if name in ADAPTERS:
        module, target, mesh, layout, rows = ADAPTERS[name]
        cfg = importlib.import_module(f"configs.{module}").get_config()
        own = {"mesh": mesh or cfg.mesh, "layout": layout or cfg.layout}
        return dataclasses.replace(cfg, **own, batch_size=rows, gradient_accumulation=1), target
    from configs import models
    from v4jax.train.config import TrainConfig

    layers, mtp, sizes, mesh, layout, target, seq, rows = CASES[name]
    model = models.flash()
    if layers != model.num_hidden_layers:
        ratios = (4, 128) * (layers // 2) + (0,) * mtp
        model = model.replace(
            **sizes,
            num_hidden_layers=layers,
            num_hash_layers=0,
            num_nextn_predict_layers=mtp,
            compress_ratios=ratios,
        )
    dtype = "float32" if target == "cpu" else "bfloat16"
    cfg = TrainConfig(
        model=model,
        run_dir="",
        mesh=mesh,
        layout=layout,
        steps=1,
        batch_size=rows,
        seq_len=seq,
        learning_rate=1e-4,
        warmup_steps=0,
        dtype=dtype,
    )
    return cfg, target


def run(name: str) -> None:
    """Compiles one case and appends its result."""
    from v4jax.planner.compiled import report_layout

    cfg, target = config(name)
    keep(name, report_layout(cfg, target).to_dict())


def recorded() -> dict[str, tuple[dict, Any]]:
    """Case -> (what compiling found, today's Estimate)."""
    from sharding.mesh import parse_mesh
    from v4jax.planner.estimate import estimate
    from v4jax.planner.hardware import target_of

    rows = {row["case"]: row for row in map(json.loads, RESULTS.read_text().splitlines())}
    found = {}
    for name in (name for name in (*CASES, *PODS, *SHIPPED, *ADAPTERS) if name in rows):
        cfg, target = config(name)
        devices = math.prod(parse_mesh(cfg.mesh).values())
        found[name] = rows[name], estimate(cfg, target_of(target, devices).hardware)
    return found


def table() -> None:
    """Prints every case that was run; ratios are estimated / compiled."""
    print(
        "| case | layers | mesh | layout | target | weights + optimizer | ratio | all memory | "
        "ratio | sent | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name, (row, paper) in recorded().items():
        cfg, target = config(name)
        state = paper.memory["weights"] + paper.memory["optimizer"]
        held, moved = row["state"] + row["temporary"], sum(row["sent"].values())
        whole, sent = "- | -", "- | -"
        if target != "cpu":
            whole = f"{held / 1e9:.2f} GB | {paper.memory_bytes / held:.2f}"
        if moved:
            sent = sum(size for size, *_ in paper.sent.values())
            sent = f"{moved / 1e9:.3f} GB | {sent / moved:.3f}"
        print(
            f"| {name} | {cfg.model.num_hidden_layers} | {cfg.mesh} | {cfg.layout} | {target} | "
            f"{row['state'] / 1e9:.3f} GB | {state / row['state']:.3f} | {whole} | {sent} |"
        )


if __name__ == "__main__":
    main()
