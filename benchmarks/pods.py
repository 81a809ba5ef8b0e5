"""The full training steps of V4-Flash and V4-Pro, compiled for TPU slices that are not there.

    python benchmarks/pods.py [--effort quick|full] [CASE ...]

It needs the extra `tpu`, minutes and several GB a case, and reports bytes a chip, compile time and
host memory. Compute is bfloat16, weights and momentum float32, the optimizer Muon; 4096 tokens a
chip, but 8192 in flash-64k, and 2048 of V4-Pro on 256 chips, where no more fit. Results with quick
effort are kept for the table of layout_accuracy.py too.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

RESULTS = pathlib.Path(__file__).parent / "layout_accuracy.jsonl"
CASES = {
    "flash-4k": ("flash", "v5p:4x4x8", "fsdp=8,expert=16", 4096, 128),
    "flash-64k": ("flash", "v5p:4x4x8", "context=8,expert=16", 65536, 16),
    "pro-4k": ("pro", "v5p:8x8x8", "fsdp=32,expert=16", 4096, 512),
    "pro-4k-256": ("pro", "v5p:4x8x8", "context=4,expert=64", 4096, 128),
    "pro-64k": ("pro", "v5p:8x8x8", "fsdp=2,context=16,expert=16", 65536, 32),
}
"""Name -> configuration, topology, mesh, tokens a row, rows a step."""


def pod_config(name: str):
    """The training configuration of a case."""
    from configs import flash, pro

    config, _, mesh, seq, batch = CASES[name]
    cfg = {"flash": flash, "pro": pro}[config].get_config()
    return dataclasses.replace(
        cfg,
        mesh=mesh,
        layout="pod",
        seq_len=seq,
        batch_size=batch,
        gradient_accumulation=1,
        stages=(),
        attention="sparse",
        index_learning_rate=0.0,
    )


def keep(name: str, report: dict) -> None:
    """Appends to RESULTS what a case keeps and sends."""
    sent = {f"{axes}: {kind}": size for axes, kind, _, size in report["collectives"]}
    row = {
        "case": name,
        "state": report["state_bytes"],
        "temporary": report["temporary_bytes"],
        "sent": sent,
        "seconds": report["compile_seconds"],
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--effort", choices=("quick", "full"), default="quick", help="of the compiler"
    )
    parser.add_argument(
        "cases", metavar="CASE", nargs="*", help=f"default: all of {', '.join(CASES)}"
    )
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"case: got {unknown.pop()!r}; known: {', '.join(CASES)}")
    print(
        "| case | mesh | effort | state | temporary | program | sum of 95 GB | sent by a chip "
        "and step | lowered + compiled | core-seconds | host memory |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in options.cases or CASES:
        print(row(name, *CASES[name], options.effort), flush=True)
    return 0


def row(name: str, config: str, target: str, mesh: str, seq: int, batch: int, effort: str) -> str:
    """One line of the table; if the step does not fit a chip, what the compiler says."""
    command = [
        sys.executable,
        "-m",
        "v4jax",
        "layout",
        f"configs/{config}.py",
        "--layout",
        "pod",
        "--json",
        "--mesh",
        mesh,
    ]
    command += ["--target", target, "--seq", str(seq), "--batch", str(batch), "--effort", effort]
    start = time.perf_counter()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        text=True,
    ) as job:
        out = job.stdout.read()
        error = job.stderr.read()
        _, status, used = os.wait4(job.pid, 0)
        job.returncode = os.waitstatus_to_exitcode(status)
    took = (
        f"{time.perf_counter() - start:.0f} s | {used.ru_utime + used.ru_stime:.0f} s | "
        f"{used.ru_maxrss / 2**20:.1f} GB |"
    )
    head = f"| {name}, {target} | {mesh} | {effort} | "
    if job.returncode:
        return head + f"{error.strip().splitlines()[-1][:200]} ||||| {took}"
    report = json.loads(out)
    if effort == "quick":
        keep(name, report)
    sizes = [report[name] / 1e9 for name in ("state_bytes", "temporary_bytes", "code_bytes")]
    sent = sum(size for *_, size in report["collectives"]) / 1e9
    paper = report["estimate"]
    parts = " | ".join(f"{size:.1f} GB" for size in sizes)
    return (
        head + f"{parts} | {sum(sizes):.1f} GB, estimated {paper['memory_bytes'] / 1e9:.1f} GB | "
        f"{sent:.0f} GB, estimated "
        f"{sum(row[2] for row in paper['sent']) / 1e9:.0f} GB | {took}"
    )


if __name__ == "__main__":
    sys.exit(main())
