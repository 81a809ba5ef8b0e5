"""The terms of the analytic model: coefficients times a few functions of sequence length and batch.

Every figure of a layout (FLOPs, bytes of memory traffic, bytes sent, bytes held) is a sum of terms

    coefficient * basis(S, B)

Python and the report page (page.html) work from one table of them, so the page's sliders need no
model of their own.

Axes: B batch (rows of all devices), S positions of a row.

Next file to read: v4jax/planner/muon.py.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sharding.rules import AxisRules
from v4jax.config import CSA, HCA, WINDOW_ONLY, ModelConfig
from v4jax.kernels.attention import GATHER_FROM


class Term(NamedTuple):
    """One addend.

    Attributes:
      kind: what it counts: "flops", "hbm" (bytes read and written), "sent", "copied" (bytes to
        the host and back), or a kind of memory held: "host", or MEMORY and WORKING of
        planner/memory.py.
      part: the part of the model.
      coefficient: FLOPs or bytes per device and step.
      basis: a key of `bases`.
      axes: mesh axes of a "sent" term.
      collective: kind of collective of a "sent" term.
      calls: how often that runs in a step.
      least: the share of those bytes that any program with this layout must send.
      cap: the most that the addend may be, for buffers of fixed size.
    """

    kind: str
    part: str
    coefficient: float
    basis: str = "one"
    axes: tuple[str, ...] = ()
    collective: str = ""
    calls: float = 0
    least: float = 1
    cap: float = math.inf

    def value(self, values: Mapping[str, float]) -> float:
        return min(self.coefficient * values[self.basis], self.cap)


def sent(
    part: str,
    axes: Iterable[str],
    kind: str,
    coefficient: float,
    basis: str = "one",
    calls: float = 1,
    least: float = 1,
) -> Term:
    """A term of kind "sent": bytes that go along mesh axes in a collective of `kind`."""
    return Term("sent", part, coefficient, basis, tuple(axes), kind, calls, least)


class Constants(NamedTuple):
    """What `bases` needs to know of model, mesh and step."""

    batch_shards: int
    seq_shards: int
    topk: int
    micro_batches: int = 1
    gather_from: int = GATHER_FROM


def constants_of(
    cfg: ModelConfig, rules: AxisRules, sizes: Mapping[str, int], micro_batches: int = 1
) -> Constants:
    """The constants of a model on a mesh.

    Raises:
      ValueError: a compress ratio of no released model, for which the bases have no entries.
    """
    odd = sorted(set(cfg.compress_ratios) - {WINDOW_ONLY, CSA, HCA})
    if odd:
        raise ValueError(
            f"compress_ratios: got {odd[0]}; the layout lab estimates 0, 4 and 128 only"
        )
    batch, seq = (
        math.prod(sizes[axis] for axis in rules.mesh_axes(name))
        for name in ("act_batch", "act_seq")
    )
    return Constants(batch, seq, cfg.index_topk, micro_batches)


def bases(k: Constants, seq: int, batch: int) -> dict[str, float]:
    """The value of each basis on one device, for one micro-batch.

    page.html repeats these lines in JavaScript.
    """
    rows = batch / (k.micro_batches * k.batch_shards)
    tokens = rows * seq / k.seq_shards
    csa, hca = seq // CSA, seq // HCA
    choice = csa > k.topk
    used = k.topk if csa >= k.gather_from * k.topk else csa
    return {
        "one": 1,
        "tokens": tokens,
        "rows": rows,
        # Entries that queries meet: all under a mask, or those gathered.
        "csa_used": tokens * used,
        "csa_gathered": tokens * (used if used < csa else 0),
        "csa_scored": tokens * csa if choice else 0,
        "csa_choice": tokens if choice else 0,
        "csa_entries": rows * csa,
        "hca_used": tokens * hca,
        "hca_entries": rows * hca,
    }


def repeated(terms: Iterable[Term], micro_batches: int) -> list[Term]:
    """The terms of a step of micro-batches, from those of a step of one.

    All but the optimizer's work, traffic and exchanges happen once a micro-batch.
    """

    def times(term: Term) -> Term:
        if term.kind not in ("flops", "hbm", "sent", "copied") or term.part == "optimizer":
            return term
        return term._replace(
            coefficient=micro_batches * term.coefficient, calls=micro_batches * term.calls
        )

    return [times(term) for term in terms]


def total(terms: Iterable[Term], values: Mapping[str, float]) -> float:
    return sum(term.value(values) for term in terms)
