"""What one device holds during a training step: weights, optimizer, gradients, activations kept, and the largest working set.

Weights and optimizer are exact. The rest restates when arrays live: gradients grow during the backward pass; under
rematerialisation each pattern of layers keeps its residual streams; and one of four working sets tops what is kept: experts'
backward pass, attention's, the head's, or Muon's. benchmarks/layout_accuracy.py compares with compiled programs.

Shapes: B rows, S tokens a row, D hidden, N heads, H head dim, X streams, E experts, F expert hidden, P rows in blocks; lower case =
this device's share.
Next file to read: v4jax/layout/estimate.py.
"""

import math
from collections.abc import Iterable, Mapping

from sharding.exchange import HEADROOM
from sharding.rules import AxisRules
from v4jax.layout.muon import muon
from v4jax.layout.terms import Term
from v4jax.layout.weights import cut_of, weights_of
from v4jax.model.attention import CHUNK_BYTES
from v4jax.train.config import TrainConfig
from v4jax.train.loss import LOGIT_BYTES

MEMORY = ("weights", "optimizer", "gradients", "activations", "caches")
WORKING = ("experts", "attention", "head", "muon")
"""Working sets: the largest counts."""

_COPIES = {"muon": 1, "adamw": 2, "frozen": 0, "none": 0}
_BLOCK = 128


def memory(cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int]) -> list[Term]:
    """Terms of the kinds MEMORY (held) and WORKING (the largest is)."""
    item = 4 if cfg.dtype == "float32" else 2
    terms = []
    for weight in weights_of(cfg.model):
        cut = cut_of(weight, rules, sizes)
        held = 4 * weight.size / cut.devices
        terms.append(Term("weights", weight.name, held))
        terms.append(Term("optimizer", weight.name, held * _COPIES[weight.optimizer]))
        if weight.optimizer in ("muon", "adamw"):
            terms.append(Term("gradients", weight.name, held))
    gradients = sum(term.coefficient for term in terms if term.kind == "gradients")
    # Newton-Schulz holds 3 arrays m x n and 2 of m x m, m <= n.
    stacks = [stack.bytes * (3 + 2 * min(stack.shape) / max(stack.shape)) for stack in muon(cfg.model, rules, sizes).stacks]
    terms.append(Term("muon", "updates", gradients + max(stacks, default=0.0)))
    terms += _activations(cfg, item) + _experts(cfg, rules, sizes, item)
    return terms + _attention(cfg, rules, sizes, item) + _head(cfg, rules, sizes, item)


def _activations(cfg: TrainConfig, item: int) -> list[Term]:
    """Residual streams that each pattern of layers keeps; without rematerialisation, everything a layer's gradient needs."""
    model = cfg.model
    streams = model.hc_mult * model.hidden_size * item
    patterns = sum(group.repeats for group in model.layer_groups) + 2 * model.num_nextn_predict_layers
    if cfg.remat:
        return [Term("activations", "streams", streams * patterns, "tokens")]
    layers = model.num_hidden_layers + model.num_nextn_predict_layers
    active = model.num_experts_per_tok
    row = 5 * streams + (3 * model.num_attention_heads * model.head_dim + 8 * model.hidden_size) * (item + 4) / 2
    row += active * (2 * model.hidden_size + 2 * model.moe_intermediate_size) * item
    return [Term("activations", "every layer", row * layers, "tokens")]


def _experts(cfg: TrainConfig, rules: AxisRules, sizes, item: int) -> list[Term]:
    """Weights in the compute dtype, rows in blocks with their hidden values and gradients, one matrix's gradient."""
    model = cfg.model
    holders, cut = (math.prod(sizes[axis] for axis in rules.mesh_axes(name)) for name in ("experts", "expert_hidden"))
    here, hidden = model.n_routed_experts / holders, model.moe_intermediate_size / cut
    matrices = here * 3 * model.hidden_size * hidden * item
    rows = model.num_experts_per_tok * (HEADROOM if rules.exchange and holders > 1 else 1)
    if holders > 1 and not rules.exchange:  # all tokens of the group are gathered, a share of their rows is filled
        rows *= holders
    row = (2 * model.hidden_size + 2 * hidden + model.hidden_size) * item
    return [
        Term("experts", "matrices and blocks", matrices + here * model.hidden_size * hidden * 4 + here * _BLOCK * row),
        Term("experts", "rows", rows * row, "tokens"),
        Term("experts", "streams", 3 * model.hc_mult * model.hidden_size * item, "tokens"),
    ]


def _attention(cfg: TrainConfig, rules: AxisRules, sizes, item: int) -> list[Term]:
    """Queries and outputs of all heads in float32 and the compute dtype, and the scores of a chunk of queries."""
    model = cfg.model
    own = model.num_attention_heads / math.prod(sizes[axis] for axis in rules.mesh_axes("act_heads"))
    heads = own * model.head_dim
    return [
        Term("attention", "queries and outputs", 3 * heads * (4 + item) / 2, "tokens"),
        Term("attention", "streams", 3 * model.hc_mult * model.hidden_size * item, "tokens"),
        Term("attention", "scores of a chunk", 12 * own * 2 * model.sliding_window, "tokens", cap=3 * CHUNK_BYTES),
        Term("attention", "scores of a chunk", 12 * own, "csa_used", cap=3 * CHUNK_BYTES),
    ]


def _head(cfg: TrainConfig, rules: AxisRules, sizes, item: int) -> list[Term]:
    """The head's matrix gathered, its gradient, logits of some positions."""
    model = cfg.model
    numbers = model.hidden_size * model.vocab_size / math.prod(sizes[axis] for axis in rules.mesh_axes("vocab"))
    words = model.vocab_size / math.prod(sizes[axis] for axis in rules.mesh_axes("vocab"))
    return [
        Term("head", "matrix and gradient", numbers * (2 * item + 4)),
        Term("head", "logits", 2 * 4 * words, "tokens", cap=2 * LOGIT_BYTES),
        Term("head", "streams", 3 * model.hc_mult * model.hidden_size * item, "tokens"),
    ]


def held(terms: Iterable[Term], values: Mapping[str, float]) -> dict[str, float]:
    """Bytes of each kind: those of MEMORY, and "temporaries", the largest working set."""
    found = dict.fromkeys((*MEMORY, *WORKING), 0.0)
    for term in terms:
        if term.kind in found:
            found[term.kind] += term.value(values)
    return {kind: found[kind] for kind in MEMORY} | {"temporaries": max(found[kind] for kind in WORKING)}


def largest_working_set(terms: Iterable[Term], values: Mapping[str, float]) -> str:
    """The name of it."""
    found = dict.fromkeys(WORKING, 0.0)
    for term in terms:
        if term.kind in found:
            found[term.kind] += term.value(values)
    return max(found, key=found.get)
