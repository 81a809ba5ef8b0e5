"""The fast model of a step's time beside XLA's own estimate, by part of the model.

    python benchmarks/estimate_accuracy.py run flash-4k-pod ...  # without names all, for hours
    python benchmarks/estimate_accuracy.py table [--parts]
    python benchmarks/estimate_accuracy.py fit                   # rates for hardware.json

It needs the extra `tpu`. Bars: the fast model within 15% of XLA's estimate on 12 cases (both
models, three lengths, three layouts), Kendall's tau at least 0.8. Steps are compared without
exchanges, since both take them from the same rates of links: the sum of the parts, and the least
time of what XLA does not estimate. Each case compiles at full effort in a process of its own, and
its result is appended to a file; the last result of a case counts.

`fit` finds for each part the shares of the chip's peaks with which max(FLOPs, bytes) comes closest
to XLA's seconds in all cases (least squares of logarithms). What is in no scope ("other") and the
norms have no FLOPs of their own in the fast model and stay out of the fit.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

RESULTS = pathlib.Path(__file__).parent / "estimate_accuracy.jsonl"
LAYOUTS = {
    "pod": ("pod", "fsdp=8,expert=16", "fsdp=32,expert=16"),
    "context": ("pod", "context=8,expert=16", "fsdp=8,context=4,expert=16"),
    "ep_fsdp": ("ep_fsdp", "fsdp=32,expert=4", "fsdp=64,expert=8"),
}
"""Name -> (layout, mesh of V4-Flash on 128 chips, mesh of V4-Pro on 512)."""

LENGTHS = {"1k": 1024, "4k": 4096, "16k": 16384}
_TOO_LARGE = ("flash-16k-ep_fsdp", "pro-16k-pod")
CASES = {
    f"{model}-{length}-{layout}": (model, LENGTHS[length], layout)
    for model, layouts in (("flash", LAYOUTS), ("pro", ("pod", "context")))
    for length in LENGTHS
    for layout in layouts
    if f"{model}-{length}-{layout}" not in _TOO_LARGE
}
TARGETS = {"flash": "v5p:4x4x8", "pro": "v5p:8x8x8"}
SHARES = [2 ** (i / 8) for i in range(-64, 3)]
"""Shares of a peak that `fit` tries: 0.4% to 119%, as a part may do less than is counted."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "one", "table", "fit"))
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--parts", action="store_true", help="one line a part too")
    options = parser.parse_args()
    if unknown := [name for name in options.cases if name not in CASES]:
        parser.error(f"got case {unknown[0]!r}; known: {', '.join(CASES)}")
    if options.command == "run":
        for name in options.cases or CASES:
            command = [sys.executable, __file__, "one", name]
            subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False)
    elif options.command == "one":
        run(options.cases[0])
    elif options.command == "fit":
        print(json.dumps(fit(), indent=1))
    else:
        table(options.parts)


def config(name: str):
    """The training configuration of a case: 4,096 tokens a chip or a row, whichever is more."""
    from configs import models
    from sharding.mesh import parse_mesh
    from v4jax.train.config import TrainConfig

    model, seq, layout = CASES[name]
    kind, *meshes = LAYOUTS[layout]
    mesh = meshes[model == "pro"]
    sizes = parse_mesh(mesh)
    rows = math.prod(sizes.values()) // sizes["context"] * max(1, 4096 * sizes["context"] // seq)
    return TrainConfig(
        model=getattr(models, model)(),
        run_dir="",
        mesh=mesh,
        layout=kind,
        steps=1,
        batch_size=rows,
        seq_len=seq,
        learning_rate=1e-4,
        warmup_steps=0,
        dtype="bfloat16",
    )


def run(name: str) -> None:
    """Compiles one case, and appends XLA's estimate of it."""
    from v4jax.planner.compiled import report_layout

    timing = report_layout(config(name), TARGETS[CASES[name][0]], estimate="compiler").timing
    row = {"case": name} | dataclasses.asdict(timing)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def compiled() -> dict[str, dict[str, float]]:
    """Case -> part -> XLA's seconds, with the least ones of what has no estimate."""
    found = {}
    for line in RESULTS.read_text().splitlines():
        row = json.loads(line)
        parts = {part: sum(seconds) for part, seconds in row["parts"].items()}
        for part, kind, _, _, least in row["unknown"]:
            if not kind.endswith("-start"):  # these run beside others
                parts[part] = parts.get(part, 0.0) + least
        found[row["case"]] = parts
    return {name: found[name] for name in CASES if name in found}


def estimated(name: str):
    """(the fast model's estimate of a case, the chip)."""
    from v4jax.planner.estimate import estimate
    from v4jax.planner.hardware import target_of

    hardware = target_of(TARGETS[CASES[name][0]]).hardware
    return estimate(config(name), hardware), hardware


def table(parts: bool) -> None:
    """Every case that was run: seconds of a step without exchanges."""
    rows = []
    print("| case | part | XLA | fast model | ratio |\n|---|---|---|---|---|")
    for name, xla in compiled().items():
        model = {part: row[2] for part, row in estimated(name)[0].parts.items()}
        rows.append((sum(xla.values()), sum(model.values())))
        print(_line(name, "all", *rows[-1]))
        for part in dict.fromkeys((*xla, *model)) if parts else ():
            print(_line("", part, xla.get(part, 0.0), model.get(part, 0.0)))
    pairs = list(itertools.combinations(rows, 2))
    same = sum(1 if (a[0] - b[0]) * (a[1] - b[1]) > 0 else -1 for a, b in pairs)
    worst = max((abs(math.log(model / xla)) for xla, model in rows), default=0.0)
    print(f"\n{len(rows)} cases; the worst is {math.exp(worst) - 1:.0%} off", end="")
    print(f"; Kendall's tau {same / len(pairs):.2f}" if pairs else "")


def _line(name: str, part: str, xla: float, model: float) -> str:
    ratio = f"{model / xla:.2f}" if xla else ""
    return f"| {name} | {part} | {xla:.3f} s | {model:.3f} s | {ratio} |"


def fit() -> dict[str, tuple[float, float]]:
    """Part -> shares of the peaks for products and for reads."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for name, xla in compiled().items():
        found, hardware = estimated(name)
        for part, (flops, moved, _) in found.parts.items():
            if xla.get(part):
                ideal = flops / hardware.bf16_flops, moved / hardware.hbm_bandwidth
                points.setdefault(part, []).append((*ideal, xla[part]))
    return {part: _shares(rows) for part, rows in sorted(points.items())}


def _shares(points: list[tuple[float, float, float]]) -> tuple[float, float]:
    """The shares with the least squared error; of equal ones the nearest to the peaks."""

    def error(shares: tuple[float, float]) -> float:
        times = (max(flops / shares[0], moved / shares[1]) for flops, moved, _ in points)
        return sum(
            math.log(time / seconds) ** 2 if time else 0.0
            for time, (_, _, seconds) in zip(times, points, strict=True)
        )

    best = min(itertools.product(SHARES, SHARES), key=lambda pair: (error(pair), -sum(pair)))
    return round(best[0], 3), round(best[1], 3)


if __name__ == "__main__":
    main()
