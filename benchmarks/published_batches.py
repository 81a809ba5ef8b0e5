"""The published batches of both models on slices of many sizes: the fastest layout that fits.

    python benchmarks/published_batches.py      # a table for docs/layout-tables.md; minutes

Everything is estimated (v4jax/planner/search.py): nothing is compiled.
"""

import dataclasses

from configs import flash, pro
from v4jax.planner.estimate import gigabytes
from v4jax.planner.hardware import hardware_of
from v4jax.planner.search import search

CHIPS = {"v5p": (64, 128, 256, 512, 1024, 2048, 4096), "h200": (64, 128, 256, 512, 1024)}


def main() -> None:
    print("| model | chips | layout, mesh | micro-batches | memory | step | MFU | tokens/s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, config in (("Flash", flash), ("Pro", pro)):
        cfg = dataclasses.replace(
            config.get_config(),
            stages=(),
            attention="sparse",
            index_learning_rate=0.0,
            gradient_accumulation=1,
        )
        for chip, counts in CHIPS.items():
            for count in counts:
                print(f"| {name} | {count} {chip} | {_best(cfg, chip, count)} |", flush=True)


def _best(cfg, chip: str, count: int) -> str:
    try:
        best = search(cfg, hardware_of(chip), count).ranked[0]
    except ValueError:
        return "nothing fits | | | | |"
    return (
        f"{best.layout}, {best.mesh} | {best.micro_batches} | {gigabytes(best.memory_bytes)} | "
        f"{best.step_seconds:.0f} s | {best.mfu:.1%} | {best.tokens_per_second:,.0f}"
    )


if __name__ == "__main__":
    main()
