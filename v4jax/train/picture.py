"""One page about a run, drawn from its metrics.jsonl alone.

It works during the run, after a crash and without a network. A "look" is a line of metrics with
measurements inside the model (v4jax/train/watch.py).

Axes: L layers, T looks.
Next file to read: v4jax/generate/cache.py.
"""

import base64
import html
import io
import math
from typing import Any

from v4jax.checkpoint.atomic import write_text
from v4jax.storage import Place, Remote
from v4jax.storage import place as place_of
from v4jax.train.goodput import PARTS
from v4jax.train.metrics_file import CURVES, METRICS, read_metrics, require_plots

PAGE = "summary.html"
_STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:1200px}"
    "td,th{padding:.15em .8em;text-align:left}img{max-width:100%}"
)


def write_summary(run) -> Place:
    """Writes RUN/summary.html: curves of the run, what happened to it, and its newest metrics.

    Curves show losses, learning rate, loads by layer over time, bias, gates, gradients and updates.

    Raises:
      ValueError: `run` has no metrics yet, or matplotlib is missing.
    """
    run = place_of(run, "run")
    lines = read_metrics(run)
    if not lines:
        raise ValueError(
            f"{run}: no {METRICS} with a line in it; expected the directory of a run that has begun"
        )
    require_plots()
    picture = base64.b64encode(_draw(lines)).decode()
    newest: dict[str, Any] = {}
    for line in lines:
        newest |= {
            name: value
            for name, value in line.items()
            if isinstance(value, (int, float)) and "event" not in line
        }
    title = f"Run {html.escape(_name_of(run))}, step {lines[-1]['step']}"
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1>",
        f'<img alt="curves of the run" src="data:image/png;base64,{picture}">',
        "<h2>What happened</h2>" + _table([line for line in lines if "event" in line]),
        "<h2>Newest values</h2><table>"
        + "".join(f"<tr><td>{name}<td>{value:.6g}" for name, value in newest.items())
        + "</table>",
    ]
    write_text(run / PAGE, "\n".join(parts) + "\n")
    return run / PAGE


def _name_of(run: Place) -> str:
    return run.name if isinstance(run, Remote) else run.resolve().name


def _table(events: list[dict[str, Any]]) -> str:
    """The events of a run as an HTML table."""
    if not events:
        return "<p>No rollback or other event.</p>"
    rows = []
    for event in events:
        rest = {
            name: value
            for name, value in event.items()
            if name not in ("step", "event", "losses_given_up")
        }
        said = "; ".join(f"{name} {value}" for name, value in rest.items())
        rows.append(
            f"<tr><td>{event['step']}<td>{html.escape(event['event'])}<td>{html.escape(said)}"
        )
    return "<table><tr><th>step<th>event<th>" + "".join(rows) + "</table>"


def _draw(lines: list[dict[str, Any]]) -> bytes:
    """All panels as one PNG."""
    from matplotlib.figure import Figure

    looks = [line for line in lines if "inside" in line]
    panels = [_losses, _rates] + (
        [_loads, _balance, _bias, _mixing, _activations, _rms] if looks else []
    )
    panels += [_goodput] if any("goodput" in line for line in lines) else []
    panels += [_rewards] if any("margin" in line for line in lines) else []
    panels += [_indexers] if any("index_captured" in line for line in lines) else []
    figure = Figure(figsize=(13, 3.4 * math.ceil(len(panels) / 2)), layout="constrained")
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(math.ceil(len(panels) / 2), 2, place)
        panel(axes, lines, looks)
        axes.set_xlabel("step")
        axes.set_xlim(0, lines[-1]["step"] + 1)
        for event in (line for line in lines if "event" in line):
            axes.axvline(
                event["step"],
                color="tab:red" if event["event"] == "rollback" else "tab:grey",
                linewidth=0.8,
                linestyle=":",
            )
    file = io.BytesIO()
    figure.savefig(file, dpi=90, format="png")
    return file.getvalue()


def _series(lines, name: str) -> tuple[list, list]:
    """(steps, values) of a metric, over the lines that have it."""
    points = [
        (line["step"], _number(line[name]))
        for line in lines
        if name in line and "event" not in line
    ]
    return [step for step, _ in points], [value for _, value in points]


def _number(value) -> float:
    return math.nan if value is None else value


def _extremes(looks, name: str, pick) -> tuple[list, list]:
    """(steps, values): what `pick` makes of all layers' values, at each look."""
    found = [
        [value for value in look["inside"]["layers"][name] if value is not None] for look in looks
    ]
    return [look["step"] for look in looks], [
        pick(values) if values else math.nan for values in found
    ]


# ---- panels: (axes, all lines, the lines that are looks) ---------------------------------------


def _losses(axes, lines, looks) -> None:
    there = {name for line in lines for name in line}
    for head, words, style in (("", "", "-"), ("held_out_", "held out, ", "o-")):
        for name, label in CURVES.items():
            if head + name in there:
                shown = _series(lines, head + name)
                axes.plot(*shown, style, label=words + label, alpha=0.8)
    for event in (line for line in lines if line.get("event") == "rollback"):
        given_up = [_number(loss) for loss in event["losses_given_up"]]
        steps = range(event["at"] - len(given_up) + 1, event["at"] + 1)
        axes.plot(
            steps,
            given_up,
            color="tab:red",
            linewidth=0.8,
            marker=".",
            label="given up (whole loss)" if event["rollback"] == 1 else None,
        )
    unit = "nats per pair; share" if "dpo" in there else "nats per token"
    axes.set_title(f"{unit}; dotted: rollbacks and other events")
    axes.legend(fontsize=8)


def _rewards(axes, lines, looks) -> None:
    for name, label in (
        ("reward_chosen", "chosen"),
        ("reward_rejected", "rejected"),
        ("margin", "margin"),
    ):
        (line,) = axes.plot(*_series(lines, name), label=label)
        held_out = _series(lines, f"held_out_{name}")
        axes.plot(*held_out, "o", color=line.get_color(), label=f"{label}, held out")
    axes.set_title("rewards: beta times log likelihood above the reference's")
    axes.legend(fontsize=7, ncols=2)


def _rates(axes, lines, looks) -> None:
    axes.semilogy(*_series(lines, "grad_norm"), label="gradient norm")
    axes.semilogy(*_series(lines, "learning_rate"), color="tab:grey", label="learning rate")
    axes.set_title("gradient norm and learning rate")
    axes.legend(fontsize=8)


def _loads(axes, lines, looks) -> None:
    import numpy as np

    load_LT = np.array(
        [[_number(value) for value in look["inside"]["layers"]["load_max"]] for look in looks],
        float,
    ).T
    # Each look has a column; columns meet halfway between looks.
    steps = np.array([look["step"] for look in looks], float)
    middle = (steps[1:] + steps[:-1]) / 2
    edges = np.concatenate(([steps[0] - 0.5], middle, [steps[-1] + 0.5]))
    mesh = axes.pcolormesh(
        edges, np.arange(load_LT.shape[0] + 1) - 0.5, load_LT, vmin=1, cmap="viridis"
    )
    axes.figure.colorbar(mesh, ax=axes)
    axes.set_title("busiest expert / mean, by layer (1 is perfect)")
    axes.set_ylabel("layer (last: MTP)")


def _balance(axes, lines, looks) -> None:
    axes.plot(*_extremes(looks, "load_entropy", min), label="load entropy, worst layer (1: even)")
    axes.plot(
        *_extremes(looks, "load_entropy", lambda values: sum(values) / len(values)),
        label="mean layer",
    )
    axes.legend(fontsize=8, loc="lower left")
    dead = axes.twinx()
    dead.plot(*_extremes(looks, "load_dead", sum), color="tab:red", linestyle="--")
    dead.set_ylabel("dead experts, all layers", color="tab:red")
    axes.set_title("balance of experts")


def _bias(axes, lines, looks) -> None:
    axes.fill_between(
        *_extremes(looks, "bias_min", min), _extremes(looks, "bias_max", max)[1], alpha=0.4
    )
    axes.set_title("router bias, range over all layers")


def _mixing(axes, lines, looks) -> None:
    for name, pick, label in (
        ("comb_norm", max, "spectral norm of comb, largest"),
        ("comb_off", max, "share from other streams, most"),
        ("pre", max, "pre gate, largest layer mean"),
        ("post", max, "post gate, largest layer mean"),
    ):
        axes.plot(*_extremes(looks, name, pick), label=label)
    axes.set_title("hyper-connections")
    axes.legend(fontsize=8)


def _activations(axes, lines, looks) -> None:
    for name, label in (("stream_max", "streams"), ("out_max", "outputs of sublayers")):
        axes.semilogy(*_extremes(looks, name, max), label=f"{label}, largest |x|")
    axes.semilogy(*_extremes(looks, "stream_rms", max), label="streams, RMS of the worst layer")
    axes.set_title("activations")
    axes.legend(fontsize=8)


def _goodput(axes, lines, looks) -> None:
    """Shares of the wall time since the run began or was resumed."""
    shown = [line for line in lines if "goodput" in line]
    total = [sum(line[f"seconds_{part}"] for part in PARTS) for line in shown]
    shares = [
        [line[f"seconds_{part}"] / all_of_it for line, all_of_it in zip(shown, total, strict=True)]
        for part in PARTS
    ]
    axes.stackplot([line["step"] for line in shown], shares, labels=PARTS, alpha=0.8)
    axes.set_ylim(0, 1)
    axes.set_title("share of wall time (each start of the run has its own clock)")
    axes.legend(fontsize=7, ncols=2, loc="lower right")


def _indexers(axes, lines, looks) -> None:
    axes.plot(*_series(lines, "index_captured"), label="captured: 1 - KL / KL of choosing blindly")
    axes.set_title("indexers")
    axes.legend(fontsize=8)


def _rms(axes, lines, looks) -> None:
    steps = [look["step"] for look in looks]
    for i, group in enumerate(looks[0]["inside"]["grad_rms"]):
        for kind, style in (("grad_rms", "-"), ("update_rms", ":")):
            values = [_number(look["inside"][kind].get(group)) for look in looks]
            axes.semilogy(
                steps, values, style, color=f"C{i}", label=group if kind == "grad_rms" else None
            )
    axes.set_title("RMS by group: gradients (solid), updates (dotted)")
    axes.legend(fontsize=7, ncols=2)
