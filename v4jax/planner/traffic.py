"""Estimates what one device sends in a training step: bytes by mesh axes and collective.

The rules restate what the program asks for: sharding/rules.py gathers weights, sharding/experts.py
and exchange.py move tokens, sharding/matrices.py moves matrices. They also restate what XLA makes
of it, as seen in compiled programs; benchmarks/layout_accuracy.py compares. Bytes are counted as in
sharding/audit.py.

Next file to read: v4jax/planner/weight_traffic.py.
"""

from collections.abc import Mapping

from sharding.rules import MESH_AXES, AxisRules
from v4jax.planner.muon import muon
from v4jax.planner.terms import Term, sent
from v4jax.planner.token_traffic import embedding_sent, experts_sent, sequence_sent, sums_sent
from v4jax.planner.weight_traffic import weight_sent
from v4jax.planner.weights import cut_of, trained_weights
from v4jax.train.config import TrainConfig


def traffic(
    cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int], platform: str
) -> list[Term]:
    """The terms of kind "sent" of one training step.

    Args:
      platform: "tpu", "gpu" or "cpu" (simulated devices, where an exchange is a gather).
    """
    axes = {
        name: [a for a in rules.mesh_axes(name) if sizes[a] > 1]
        for name in ("act_batch", "act_seq", "act_heads", "experts", "vocab")
    }
    tokens = [axis for axis in MESH_AXES if axis in axes["act_batch"] + axes["act_seq"]]
    terms = []
    for weight in trained_weights(cfg):
        terms += weight_sent(
            cfg, weight, cut_of(weight, rules, sizes), tokens, axes["act_seq"], sizes, platform
        )
    terms += [
        sent("optimizer", [axis], kind, size) for axis, kind, size in muon(cfg, rules, sizes).sent
    ]
    terms += experts_sent(cfg, rules, sizes, platform)
    terms += sums_sent(cfg, rules, axes["act_heads"], sizes, platform)
    terms += sequence_sent(cfg, axes["act_seq"], sizes)
    return [term for term in terms + embedding_sent(cfg, rules, axes, sizes) if term.coefficient]
