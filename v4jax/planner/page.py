"""A report as one self-contained page: the estimate's terms, and JavaScript that evaluates them.

The page needs no network and no server. Its sliders change tokens a row and rows a step; it
recomputes memory, time and traffic from the same terms as v4jax/planner/estimate.py
(tests/test_page.py compares the two in a browser).

Next file to read: v4jax/planner/page.html.
"""

import collections
import dataclasses
import json
import math
import pathlib
from typing import Any

from sharding.mesh import parse_mesh
from sharding.rules import layout_for
from v4jax.cost import cost
from v4jax.planner.estimate import USABLE, platform_of, rates_of, terms_of
from v4jax.planner.hardware import Hardware, target_of
from v4jax.planner.memory import MEMORY, WORKING
from v4jax.planner.notes import notes, parameters
from v4jax.planner.request import Request
from v4jax.planner.results import Comparison, Result, Searched
from v4jax.planner.search import as_estimated
from v4jax.planner.terms import Term, constants_of
from v4jax.storage import local_path
from v4jax.train.config import TrainConfig

TEMPLATE = pathlib.Path(__file__).parent / "page.html"
_STEPS = 7
"""How many numbers of rows the slider offers, each twice the one before."""


def report(
    path: str, cfg: TrainConfig, request: Request, result: Result | Searched | Comparison
) -> None:
    """Writes the page of one layout, or of the best layout of a search, to `path`.

    Raises:
      ValueError: a comparison, which has no page.
    """
    file = local_path(path, "path")
    if isinstance(result, Searched):
        best = result.found.ranked[0]
        cfg = as_estimated(cfg, best)
        hardware = target_of(request.target).hardware
        lines = (result.found.why(), *notes(cfg, best, hardware))
        result = Result(best, next(iter(result.confirmed), None), lines)
    elif not isinstance(result, Result):
        raise ValueError("--report: shows one layout; leave out --compare")
    hardware = target_of(request.target, result.estimate.devices).hardware
    data = page_data(cfg, hardware, result, request)
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    file.write_text(TEMPLATE.read_text().replace(">DATA<", f">{text}<"))


def page_data(
    cfg: TrainConfig, hardware: Hardware, result: Result, request: Request
) -> dict[str, Any]:
    """Everything the page shows, as plain values."""
    sizes = parse_mesh(cfg.mesh)
    rules = layout_for(cfg.layout, sizes)
    found, devices = result.estimate, math.prod(sizes.values())
    seqs, batches = _lengths(cfg, rules, sizes)
    terms = terms_of(
        cfg, rules, sizes, platform_of(hardware), found.what, request.released, request.fp8
    )
    cuts = collections.defaultdict(list)
    for name, axes in rules.table:
        for axis in axes:
            cuts[axis].append(name)
    return {
        "title": f"{cfg.layout} on {cfg.mesh or 'one device'}",
        "subtitle": f"{found.what}, {devices} devices of {hardware.name}, {_compiled(result)}",
        "what": found.what,
        "seq": cfg.seq_len,
        "batch": cfg.batch_size,
        "seqs": seqs,
        "batches": batches,
        "fp8": request.fp8,
        "rates": rates_of(cfg, hardware.of_a_device(devices), request.fp8),
        "sizes": sizes,
        "hardware": dataclasses.asdict(hardware.of_a_device(devices)),
        "constants": constants_of(cfg.model, rules, sizes, cfg.micro_batches)._asdict(),
        "terms": [
            term._asdict() | {"cap": None if math.isinf(term.cap) else term.cap}
            for term in merged(terms)
        ],
        "kinds": MEMORY,
        "working": WORKING,
        "usable": USABLE,
        "compiler": _timing(result),
        "notes": result.notes,
        "parameters": parameters(cfg),
        "cuts": cuts,
        "model_flops": {seq: _flops(cfg, seq, found.what) for seq in seqs},
        "experts": cfg.model.n_routed_experts,
        "heads": cfg.model.num_attention_heads,
        "weights": found.memory["weights"],
        "rules": {
            name: rules.mesh_axes(name) for name in ("experts", "act_batch", "act_seq", "act_heads")
        },
    }


def _timing(result: Result) -> dict[str, Any] | None:
    """XLA's estimate by part, for the lengths that were asked for; None without one."""
    if result.compiled is None or result.compiled.timing is None:
        return None
    return dataclasses.asdict(result.compiled.timing)


def merged(terms: list[Term]) -> list[Term]:
    """The same sums in fewer terms: memory by kind, the rest by part. Capped terms stay apart."""
    table: dict[Any, Term] = {}
    for term in terms:
        part = "" if term.kind in (*MEMORY, *WORKING) else term.part
        key = (
            term.kind,
            part,
            term.basis,
            term.axes,
            term.collective,
            term.least,
            term.cap if math.isinf(term.cap) else object(),
        )
        known = table.get(key, term._replace(part=part, coefficient=0, calls=0))
        table[key] = known._replace(
            coefficient=known.coefficient + term.coefficient, calls=known.calls + term.calls
        )
    return list(table.values())


def _lengths(cfg: TrainConfig, rules, sizes) -> tuple[list[int], list[int]]:
    """Tokens a row and rows a step that the sliders offer: doublings that divide over the mesh.

    Those that were asked for are among them.
    """
    cut, rows = (
        math.prod(sizes[axis] for axis in rules.mesh_axes(name))
        for name in ("act_seq", "act_batch")
    )
    seqs = {cfg.seq_len} | {
        2**n for n in range(9, 21) if 2**n % cut == 0 and 2**n <= cfg.model.max_position_embeddings
    }
    return sorted(seqs), sorted({cfg.batch_size} | {rows * 2**n for n in range(_STEPS)})


def _flops(cfg: TrainConfig, seq: int, what: str) -> float:
    found = cost(cfg.model, seq)
    return found.train_flops if what == "train" else found.total.flops


def _compiled(result: Result) -> str:
    report = result.compiled
    if report is None:
        return "estimated: nothing was compiled"
    if report.temporary_bytes is None:
        return f"estimated, and lowered: {report.state_bytes / 1e9:.2f} GB of state"
    sent = sum(row[3] for row in report.collectives)
    return (
        f"estimated; compiled: {report.state_bytes / 1e9:.2f} GB of state, "
        f"{report.temporary_bytes / 1e9:.2f} GB temporary, {sent / 1e9:.2f} GB sent"
    )
