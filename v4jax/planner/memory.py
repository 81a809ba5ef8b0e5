"""Estimates what one device holds in a training step, by kind of memory.

Weights and optimizer are exact. The rest restates when arrays live. Gradients grow during the
backward pass. What layers keep depends on the remat policy (v4jax/remat.py). The largest of the
working sets comes on top: that of the backward pass of one pattern, which first recomputes its
layers, of the head, or of the optimizer. What a backward pass holds is read off the buffers of
compiled programs: those of TPUs, where the fused kernels run, are in v4jax/planner/backward.py,
those of other platforms here. benchmarks/layout_accuracy.py compares.

Next file to read: v4jax/planner/backward.py.
"""

import math
from collections.abc import Iterable, Mapping

from sharding.rules import AxisRules
from v4jax.config import ModelConfig
from v4jax.kernels.attention import CHUNK_BYTES
from v4jax.planner import adapted, backward
from v4jax.planner.host import SLICES, patterns_of, stream_bytes
from v4jax.planner.muon import muon, state_bytes
from v4jax.planner.terms import Term
from v4jax.planner.weight_traffic import bytes_in_products
from v4jax.planner.weights import check_packed, cut_of, trained_weights, weights_of
from v4jax.remat import ATTENTION, EXPERTS, LAYERS, POLICIES
from v4jax.train.config import TrainConfig
from v4jax.train.losses.next_token import LOGIT_BYTES

MEMORY = ("weights", "optimizer", "gradients", "activations", "caches")
WORKING = (*backward.WORKING, "head", "muon")
"""Working sets; the largest counts."""

_SITES = 2
"""Sites of mHC in a layer."""


def memory(
    cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int], platform: str
) -> list[Term]:
    """The terms of the kinds MEMORY, which add up, and WORKING, of which the largest counts.

    Args:
      platform: "tpu", "gpu" or "cpu".

    Raises:
      ValueError: the layout would cut blocks of a packed base.
    """
    if cfg.lora is not None and cfg.lora.base_dtype == "packed":
        check_packed(cfg.model, rules, sizes)
    item = 4 if cfg.dtype == "float32" else 2
    teachers = sum(map(bool, cfg.distill.teachers))  # as large as what is trained
    terms = []
    for weight in trained_weights(cfg):
        cut = cut_of(weight, rules, sizes)
        held = weight.held * weight.size / cut.devices
        same = 1 + teachers * weight.name.startswith("lora/")
        terms.append(Term("weights", weight.name, same * held))
        if cfg.gather == "step" and cut.tokens > 1:
            whole = bytes_in_products(cfg, weight) * weight.size / cut.others
            terms.append(Term("weights", f"{weight.name}, gathered", whole))
        state = state_bytes(cfg, weight.optimizer)
        if cfg.optimizer_memory == "device":
            terms.append(Term("optimizer", weight.name, state * weight.size / cut.devices))
        if weight.optimizer in ("muon", "adamw"):
            late = platform == "tpu" and backward.is_late(cfg, weight)
            terms.append(Term("muon" if late else "gradients", weight.name, held))
        if platform == "tpu":
            terms += backward.relaid(cfg, weight, rules, sizes)
    if cfg.optimizer_memory == "host":
        terms.append(Term("optimizer", "slices", SLICES))
    # Newton-Schulz holds 3 arrays of m x n and 2 of m x m, m <= n.
    stacks = [
        stack.bytes * (3 + 2 * min(stack.shape) / max(stack.shape))
        for stack in muon(cfg, rules, sizes).stacks
    ]
    terms.append(Term("muon", "updates", max(stacks, default=0.0)))
    terms += _head(cfg, rules, sizes, item, platform)
    whole = POLICIES[cfg.remat].part == LAYERS
    if platform == "tpu":
        kept = _streams(cfg, 0) if whole else backward.kept_terms(cfg, rules, sizes)
        return terms + kept + backward.working_terms(cfg, rules, sizes)
    # MTP's module counts as two patterns.
    kept = _streams(cfg, cfg.model.num_nextn_predict_layers) if whole else _kept(cfg, item)
    return terms + kept + _layers(cfg, rules, sizes, item)


def _streams(cfg: TrainConfig, mtp: int) -> list[Term]:
    """What a recomputed pattern of layers keeps: its residual streams, with "dots" also products.

    Args:
      mtp: MTP's modules whose streams are still there when the memory is largest.
    """
    model, layers = cfg.model, cfg.model.num_hidden_layers + mtp
    patterns = patterns_of(cfg) - 2 * (model.num_nextn_predict_layers - mtp)
    if cfg.remat == "offload":  # those of one pattern come back while another's are in use
        patterns = min(patterns, 2)
    kept = [Term("activations", "streams", stream_bytes(cfg) * patterns, "tokens")]
    if cfg.remat == "dots":
        item = 4 if cfg.dtype == "float32" else 2
        kept.append(Term("activations", "products", _products(model) * item * layers, "tokens"))
    return kept


def _kept(cfg: TrainConfig, item: int) -> list[Term]:
    """What each layer keeps: all that its gradient needs, except inside a recomputed part."""
    model, policy, streams = cfg.model, POLICIES[cfg.remat], stream_bytes(cfg)
    layers = model.num_hidden_layers + model.num_nextn_predict_layers
    row = 5 * streams + 8 * model.hidden_size * (item + 4) / 2
    if policy.part != ATTENTION:
        row += 3 * model.num_attention_heads * model.head_dim * (item + 4) / 2
    if policy.part != EXPERTS:
        active = model.num_experts_per_tok
        row += active * (2 * model.hidden_size + 2 * model.moe_intermediate_size) * item
    return [Term("activations", "every layer", row * layers, "tokens")]


def _products(model: ModelConfig) -> float:
    """Numbers that the products of a layer with weights give for a token.

    They are queries (narrow, then wide), keys, attention's output (narrow, then wide), and those of
    the shared expert. Compressors and indexers give few.
    """
    attention = (
        model.q_lora_rank
        + (model.num_attention_heads + 1) * model.head_dim
        + model.o_groups * model.o_lora_rank
        + model.hidden_size
    )
    return attention + 2 * model.moe_intermediate_size + model.hidden_size


def _layers(cfg: TrainConfig, rules: AxisRules, sizes, item: int) -> list[Term]:
    """The backward pass of one pattern: what its layers keep, and what the current layer makes."""
    model = cfg.model
    # Elsewhere `_activations` counts what layers keep.
    whole = POLICIES[cfg.remat].part == LAYERS
    layers = max(len(group.kinds) for group in model.layer_groups) if whole else 1
    rows = backward.rows_of(cfg, rules, sizes)
    hidden, matrix, blocks = rows.hidden, rows.matrix, rows.filler
    gathered = any(
        cut_of(weight, rules, sizes).tokens > 1 for weight in weights_of(model) if weight.is_expert
    )
    own = model.num_attention_heads / math.prod(
        sizes[axis] for axis in rules.mesh_axes("act_heads")
    )
    # The streams that mHC reads, in float32 and in the compute dtype; queries and outputs of heads,
    # once in float32 and in some layouts; eight arrays of the hidden width.
    kept = (
        _SITES * model.hc_mult * model.hidden_size * (4 + item)
        + own * model.head_dim * (4 + 3.5 * item)
        + 8 * model.hidden_size * 4
    )
    kept_rows = (model.hidden_size + 2 * hidden) * item
    # Matrices are in the compute dtype, gradients in float32. Experts that rows travel to also have
    # copies in the layouts of their products, and gradients of earlier rounds.
    copies, gradients = (5 if gathered else 3, 7) if rows.travel else (3, 3)
    matrices = matrix * (layers * copies * item + gradients * 4)
    made_rows = 2 * model.hidden_size * item
    if cfg.lora is not None:
        # Constants have no gradients; one at a time is in the compute dtype. Rows are masked for
        # pairs, and their gradients come from W and from a pair.
        matrices = matrix * (layers * 3 * adapted.expert_bytes(cfg, item) + item)
        kept_rows += adapted.row_bytes(cfg, hidden, backward.BLOCK, item, item)
        made_rows = 5 * model.hidden_size * item
    return [
        Term("layers", "matrices and blocks", matrices + blocks * (layers * kept_rows + made_rows)),
        Term("layers", "rows of experts", rows.landed * (layers * kept_rows + made_rows), "tokens"),
        Term("layers", "streams, queries and outputs", layers * kept, "tokens"),
        Term(
            "layers",
            "scores of a chunk",
            12 * own * 2 * model.sliding_window,
            "tokens",
            cap=3 * CHUNK_BYTES,
        ),
        Term("layers", "scores of a chunk", 12 * own, "csa_used", cap=3 * CHUNK_BYTES),
    ]


def _head(cfg: TrainConfig, rules: AxisRules, sizes, item: int, platform: str) -> list[Term]:
    """The head's gathered matrix, its gradient, and the logits of some positions."""
    # XLA:TPU sums the gradient in the compute dtype.
    grad = item if platform == "tpu" else item + 4
    model = cfg.model
    numbers = (
        model.hidden_size
        * model.vocab_size
        / math.prod(sizes[axis] for axis in rules.mesh_axes("vocab"))
    )
    words = model.vocab_size / math.prod(sizes[axis] for axis in rules.mesh_axes("vocab"))
    return [
        Term("head", "matrix and gradient", numbers * (item + grad)),
        Term("head", "logits", 2 * 4 * words, "tokens", cap=2 * LOGIT_BYTES),
        Term("head", "streams", 3 * model.hc_mult * model.hidden_size * item, "tokens"),
    ]


def held(terms: Iterable[Term], values: Mapping[str, float]) -> dict[str, float]:
    """Bytes of each kind of MEMORY, and of "temporaries", the largest working set."""
    found = _found(terms, values)
    sets = _beside_activations(found)
    return {kind: found[kind] for kind in MEMORY} | {"temporaries": max(0.0, *sets.values())}


def largest_working_set(terms: Iterable[Term], values: Mapping[str, float]) -> str:
    """The name of the largest working set."""
    sets = _beside_activations(_found(terms, values))
    return max(sets, key=lambda kind: sets[kind])


def _found(terms: Iterable[Term], values: Mapping[str, float]) -> dict[str, float]:
    found: dict[str, float] = dict.fromkeys((*MEMORY, *WORKING), 0.0)
    for term in terms:
        if term.kind in found:
            found[term.kind] += term.value(values)
    return found


def _beside_activations(found: Mapping[str, float]) -> dict[str, float]:
    """Bytes of each working set that come on top of activations; page.html repeats this.

    Activations are gone when the optimizer runs, so its working set takes their place.
    """
    return {
        kind: found[kind] - (found["activations"] if kind == "muon" else 0.0) for kind in WORKING
    }
