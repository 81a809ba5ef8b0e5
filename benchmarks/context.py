"""FLOPs of a token and bytes of its cache against context: docs/context.png.

    python benchmarks/context.py [--out docs/context.png]     # extra plots; seconds, runs no model

It draws figure 1 of the report, beside DeepSeek-V3.2 and GQA-8. Bytes are those of the real arrays
of `empty_cache` in official storage, FLOPs those of v4jax/cost.py. The table has the report's
ratios.
"""

import argparse
import os

PUBLISHED = {"flash": (0.10, 0.07), "pro": (0.27, 0.10)}
"""FLOPs and cache of a token at 1M tokens, over DeepSeek-V3.2's (report, abstract and figure 1)."""


def cache_bytes(cfg, tokens: int) -> int:
    """Bytes of the real pytree, MTP's window included; nothing is allocated."""
    import jax
    import jax.numpy as jnp

    from v4jax.generate.cache import empty_cache

    cache = jax.eval_shape(lambda: empty_cache(cfg, 1, tokens, jnp.bfloat16, "official"))
    return sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((cache.layers, cache.mtp))
    )


def draw(curves: dict[str, list[tuple[int, float, float]]], path: str) -> None:
    """Draws the curves: name -> (tokens, FLOPs of a token or 0, bytes)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    for place, title in ((1, "FLOPs of one token"), (2, "bytes of cache of one sequence")):
        axes = figure.add_subplot(1, 2, place)
        for name, points in curves.items():
            if points[0][place]:
                axes.loglog(
                    [point[0] for point in points], [point[place] for point in points], label=name
                )
        axes.set_title(title)
        axes.set_xlabel("tokens of context")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="docs/context.png")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from configs import models
    from v4jax.cost import cost, deepseek_v32, gqa8

    lengths = [2**n for n in range(12, 21)]
    curves = {"DeepSeek-V3.2": [(n, deepseek_v32(n).flops, deepseek_v32(n).cache) for n in lengths]}
    print(
        "model    tokens   FLOPs/token   / V3.2   report   cache bytes   / V3.2   report   / GQA-8"
    )
    for name, published in PUBLISHED.items():
        cfg = getattr(models, name)()
        curves[f"V4-{name}"] = [(n, cost(cfg, n).total.flops, cache_bytes(cfg, n)) for n in lengths]
        curves[f"GQA-8, bf16, layers of {name}"] = [(n, 0, gqa8(cfg, n).cache) for n in lengths]
        for n, flops, size in curves[f"V4-{name}"][::2]:
            v32, said = deepseek_v32(n), published if n == 2**20 else ("", "")
            row = (
                f"{flops / 1e9:9.1f}B",
                f"{flops / v32.flops:8.3f}",
                f"{said[0]!s:>6}",
                f"{size / 1e6:10.1f}M",
                f"{size / v32.cache:8.3f}",
                f"{said[1]!s:>6}",
            )
            print(f"{name:6s} {n:8d}   {'   '.join(row)}   {size / gqa8(cfg, n).cache:7.3f}")
    draw(curves, arguments.out)


if __name__ == "__main__":
    main()
