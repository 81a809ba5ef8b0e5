"""The metrics of a run as its file has them, and a plot of its losses.

Next file to read: v4jax/train/picture.py.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from v4jax import storage
from v4jax.checkpoint.atomic import json_text
from v4jax.storage import place

METRICS = "metrics.jsonl"
CURVES = {
    "nll": "next token",
    "mtp_nll": "token after next (MTP)",
    "dpo": "DPO loss",
    "kl": "KL to the teachers",
    "accuracy": "pairs with the chosen answer ahead",
}
"""Metrics that a picture of losses shows where a run has them, and what they are."""


def require_plots() -> None:
    """Raises ValueError unless the packages for plots and TensorBoard are installed."""
    try:
        import matplotlib  # noqa: F401
        import tensorboardX  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"training draws its losses and needs {error.name}: pip install 'v4jax[plots]'"
        ) from None


class JsonLines:
    """A metric writer (v4jax/train/trackers.py) that appends to the run's metrics.jsonl."""

    def __init__(self, run: pathlib.Path):
        self._file = (run / METRICS).open("a")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line, which is in the file when this returns."""
        self._file.write(json_text({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(run) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl: metrics of a step, a look inside, or an "event".

    None as a value means a number that is not finite. A last line cut short by a crash is left out.
    """
    path = place(run, "run") / METRICS
    if not path.exists():
        return []
    lines = storage.read(path).decode().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def plot_losses(run: pathlib.Path, unigram_nll: float | None = None) -> pathlib.Path:
    """Draws loss.png: training and held-out loss, expert load and learning rate.

    Args:
      unigram_nll: held-out nats per token of a unigram model, drawn as a line; None: no line.
    """
    from matplotlib.figure import Figure

    lines = read_metrics(run)

    def series(name):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        return [list(values) for values in zip(*points, strict=True)] or [[], []]

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    there = {name for line in lines for name in line}
    for head, words, style in (("", "training, ", "-"), ("held_out_", "held out, ", "o-")):
        for name, label in CURVES.items():
            if head + name in there:
                top.plot(*series(head + name), style, label=words + label, alpha=0.8)
    if unigram_nll is not None:
        top.axhline(unigram_nll, color="grey", linestyle="--", label="unigram model, held out")
    top.set_ylabel("nats per pair; share" if "dpo" in there else "nats per token")
    top.legend()
    bottom.plot(
        *series("expert_load_max"), color="tab:red", label="max / mean expert load, worst layer"
    )
    bottom.set_ylabel("expert load")
    bottom.set_xlabel("step")
    bottom.legend(loc="upper left")
    rate = bottom.twinx()
    rate.plot(*series("learning_rate"), color="tab:grey", linestyle=":")
    rate.set_ylabel("learning rate")
    path = run / "loss.png"
    figure.savefig(path, dpi=110)
    return path
