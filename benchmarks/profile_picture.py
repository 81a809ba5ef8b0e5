"""Time of a step by part of the model, from a run with --profile: docs/profiling.png.

    python benchmarks/profile_picture.py RUN [--out docs/profiling.png]     # extra plots; seconds

It draws the table that the run has printed, from the run's metrics.jsonl.
"""

import argparse


def main() -> None:
    from matplotlib.figure import Figure

    from v4jax.train.metrics_file import read_metrics

    arguments = argparse.ArgumentParser()
    arguments.add_argument("run")
    arguments.add_argument("--out", default="docs/profiling.png")
    arguments = arguments.parse_args()
    event = [line for line in read_metrics(arguments.run) if line.get("event") == "profile"][-1]
    parts = list(event["seconds"])[::-1]
    milliseconds = [1e3 * event["seconds"][part] / event["steps"] for part in parts]
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(parts, milliseconds)
    shares = [f"{value / sum(milliseconds):.0%}" for value in milliseconds]
    axes.bar_label(bars, shares, padding=3)
    axes.set_xlim(0, 1.1 * max(milliseconds))  # room for the labels
    axes.set_xlabel("milliseconds a step")
    figure.savefig(arguments.out, dpi=110)


if __name__ == "__main__":
    main()
