"""The full training step of V4-Flash and V4-Pro, compiled for TPU slices that are not there: bytes a chip, time and memory it takes.

    python benchmarks/pods.py [CASE ...]          needs the extra `tpu`; minutes and several GB a case

bfloat16 compute, float32 weights and momentum, Muon, one sequence a chip (or one a row of chips, where the sequence is cut).
"""

import json
import os
import subprocess
import sys
import time

CASES = {
    "flash-4k": ("flash", "v5p:4x4x8", "fsdp=8,expert=16", 4096, 128),
    "flash-64k": ("flash", "v5p:4x4x8", "context=8,expert=16", 65536, 16),
    "pro-4k": ("pro", "v5p:8x8x8", "fsdp=32,expert=16", 4096, 512),
    "pro-64k": ("pro", "v5p:8x8x8", "fsdp=2,context=16,expert=16", 65536, 32),
}
"""Name -> configuration, topology, mesh, tokens a row, rows a step."""


def main() -> int:
    chosen = sys.argv[1:] or list(CASES)
    if unknown := [name for name in chosen if name not in CASES]:
        print(f"case: got {unknown[0]!r}; known: {', '.join(CASES)}", file=sys.stderr)
        return 2
    print("| case | mesh | state | temporary | sum of 95 GB | lowered + compiled | core-seconds | host memory |\n|---|---|---|---|---|---|---|---|")
    for name in chosen:
        print(row(name, *CASES[name]), flush=True)
    return 0


def row(name: str, config: str, target: str, mesh: str, seq: int, batch: int) -> str:
    """One line of the table; where the step does not fit a chip, what the compiler says."""
    command = [sys.executable, "-m", "v4jax", "layout", f"configs/{config}.py", "--layout", "pod", "--json", "--mesh", mesh]
    command += ["--target", target, "--seq", str(seq), "--batch", str(batch)]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"}, text=True) as job:
        out = job.stdout.read()
        error = job.stderr.read()
        _, status, used = os.wait4(job.pid, 0)
        job.returncode = os.waitstatus_to_exitcode(status)
    took = f"{time.perf_counter() - start:.0f} s | {used.ru_utime + used.ru_stime:.0f} s | {used.ru_maxrss / 2**20:.1f} GB |"
    head = f"| {name}, {target} | {mesh} | "
    if job.returncode:
        return head + f"{error.strip().splitlines()[-1][:200]} ||| {took}"
    report = json.loads(out)
    state, temporary = report["state_bytes"] / 1e9, report["temporary_bytes"] / 1e9
    return head + f"{state:.1f} GB | {temporary:.1f} GB | {state + temporary:.1f} GB | {took}"


if __name__ == "__main__":
    sys.exit(main())
