"""Estimates what one device computes and moves through memory in a training step, part by part.

FLOPs are those that the program executes, not those of the model (v4jax/cost.py): masked entries
are computed, layers are recomputed in the backward pass, and weights that no axis cuts are
multiplied on every device. Memory traffic counts each large array once per product or fused loop
that reads or writes it; it is the rougher of the two.

Next file to read: v4jax/planner/traffic.py.
"""

import math
from collections.abc import Mapping

from sharding.rules import AxisRules
from v4jax.config import CSA, HCA, ModelConfig
from v4jax.planner.muon import Stack, muon, state_bytes
from v4jax.planner.recompute import multiplies_again, recomputes
from v4jax.planner.terms import Term
from v4jax.planner.weights import Weight, cut_of, trained_weights, weights_of
from v4jax.train.config import TrainConfig
from v4jax.train.newton_schulz import COEFFICIENTS

FP8 = ("routed experts", "shared experts", "attention")
"""Parts whose products have fp8 operands in fp8 recipes."""


def passes(cfg: TrainConfig, weight: Weight) -> int:
    """Products per weight and step, in forward passes: a backward pass counts as two."""
    if weight.optimizer == "frozen":
        return 2 if multiplies_again(cfg, weight.part) else 1  # no gradient passes the indexer
    own = weight.optimizer != "constant"  # has a gradient of its own
    if weight.part == "head":
        return 3 + own  # the loss keeps no logits under any policy
    return (3 if multiplies_again(cfg, weight.part) else 2) + own


def _read(cfg: TrainConfig, weight: Weight, others: int, item: int, passes: int) -> list[Term]:
    """Packed weights are read and written as numbers before each product, but once for a gradient.

    The last product of a backward pass reads what was made for the one before.
    """
    if weight.held >= 2:
        return []
    times = passes - 1
    return [Term("hbm", weight.part, weight.size / others * (weight.held + item) * times)]


def work(
    cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int], platform: str, fp8: bool = False
) -> list[Term]:
    """The terms of kind "flops" and "hbm" of one device and step.

    Args:
      platform: "tpu", "gpu" or "cpu".
      fp8: whether products have fp8 operands, which are made from others first.
    """
    model, item = cfg.model, 4 if cfg.dtype == "float32" else 2
    terms = []
    for weight in trained_weights(cfg):
        cut, part = cut_of(weight, rules, sizes), weight.part
        if weight.optimizer not in ("none", "constant"):
            # The gradient is read; the parameter and the state are read and written.
            moved = 12 + 2 * state_bytes(cfg, weight.optimizer)
            terms.append(Term("hbm", "optimizer", weight.size / cut.devices * moved))
        if weight.uses:
            n = passes(cfg, weight)
            # The experts' axis leaves FLOPs unchanged: fewer experts, with more rows each.
            here = weight.size / (
                _parts(rules, sizes, "expert_hidden") if weight.is_expert else cut.others
            )
            terms.append(Term("flops", part, 2 * here * weight.uses * n, "tokens"))
            terms.append(Term("hbm", part, weight.size / cut.others * item * n))
            if weight.optimizer == "constant":
                terms += _read(cfg, weight, cut.others, item, n)
    for stack in muon(cfg, rules, sizes).stacks:
        terms += _orthogonalise(stack)
    layers = layers_by_ratio(model)
    terms += _scores(
        cfg, layers, _parts(rules, sizes, "act_heads"), _parts(rules, sizes, "index_heads")
    )
    if fp8:
        terms += _operands(cfg, rules, sizes, item)
    return terms + _rows(cfg, rules, sizes, item, platform)


def layers_by_ratio(model: ModelConfig) -> dict[int, int]:
    """Compress ratio -> number of layers with it, MTP's included."""
    return {ratio: model.compress_ratios.count(ratio) for ratio in (0, CSA, HCA)}


def _parts(rules: AxisRules, sizes: Mapping[str, int], name: str) -> int:
    return math.prod(sizes[axis] for axis in rules.mesh_axes(name))


def _scores(cfg: TrainConfig, layers: dict[int, int], tensor: int, index_parts: int) -> list[Term]:
    """Attention over window and entries, and the indexer's scores.

    Attention scores are a part of their own because fp8 recipes leave them in bf16. Chunks of
    queries are recomputed on their own.
    """
    model = cfg.model
    again = 5 if recomputes(cfg, "attention scores") else 4
    heads, wide = (
        model.num_attention_heads / tensor,
        model.num_attention_heads * model.head_dim / tensor,
    )
    index = (
        2
        * model.index_n_heads
        * (model.index_head_dim + 1)
        / index_parts
        * (2 + recomputes(cfg, "indexers"))
    )
    # Scores are float32 and pass memory about four times each way: product, mask and exponent, sum,
    # product.
    moved = 4 * 4 * heads * again / 2
    window = 2 * model.sliding_window * sum(layers.values())
    return [
        Term("flops", "attention scores", 4 * wide * window * again, "tokens"),
        Term("flops", "attention scores", 4 * wide * layers[CSA] * again, "csa_used"),
        Term("flops", "attention scores", 4 * wide * layers[HCA] * again, "hca_used"),
        Term("flops", "indexers", index * layers[CSA], "csa_scored"),
        Term("hbm", "attention scores", moved * window, "tokens"),
        Term("hbm", "attention scores", moved * layers[CSA], "csa_used"),
        Term("hbm", "attention scores", moved * layers[HCA], "hca_used"),
        Term(
            "hbm", "attention scores", 2 * 2 * model.head_dim * layers[CSA] * again, "csa_gathered"
        ),
        Term("hbm", "indexers", 4 * 3 * 3 * layers[CSA], "csa_scored"),
    ]


def _rows(
    cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int], item: int, platform: str
) -> list[Term]:
    """Memory traffic of activations other than scores: streams, attention, experts and logits.

    Kernels of a GPU run one after another, so element-wise ones are parts of their own. XLA:TPU
    fuses them with products, and the slower of the two counts.
    """
    model = cfg.model
    layers = sum(layers_by_ratio(model).values())
    tensor = _parts(rules, sizes, "act_heads")
    # Two sites: mixing logits, collapse, and what expand reads and writes.
    streams = 2 * 5 * model.hc_mult * model.hidden_size
    attention = 6 * model.num_attention_heads * model.head_dim / tensor + 12 * model.hidden_size
    hidden = _parts(rules, sizes, "expert_hidden")
    experts = model.num_experts_per_tok * (
        4 * model.hidden_size + 5 * model.moe_intermediate_size / hidden
    )
    passes = {part: 3 + recomputes(cfg, part) for part in ("mHC", "attention", "routed experts")}
    apart = ", element-wise" if platform == "gpu" else ""
    logits = (
        3
        * 4
        * model.vocab_size
        / _parts(rules, sizes, "vocab")
        * 4
        * (1 + model.num_nextn_predict_layers)
    )
    return [
        Term("hbm", "mHC", streams * item * passes["mHC"] * layers, "tokens"),
        Term("hbm", "attention" + apart, attention * item * passes["attention"] * layers, "tokens"),
        Term(
            "hbm",
            "routed experts" + apart,
            experts * item * passes["routed experts"] * layers,
            "tokens",
        ),
        Term("hbm", "head", logits, "tokens"),
    ]


def _operands(
    cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int], item: int
) -> list[Term]:
    """Making the fp8 operands of experts' products, and of attention's with its weights.

    A block has one scale along the axis that a product sums over. The backward pass sums over other
    axes and so needs each array a second time. An array is read once and written once for a forward
    pass that keeps nothing, and written twice otherwise. A matrix of weights costs as much as an
    input.
    """
    model, layers = cfg.model, sum(layers_by_ratio(cfg.model).values())
    tensor, cut = _parts(rules, sizes, "act_heads"), _parts(rules, sizes, "expert_hidden")
    hidden, latent, heads = (
        model.hidden_size,
        model.q_lora_rank,
        model.num_attention_heads * model.head_dim / tensor,
    )
    groups, wide = model.o_groups * model.o_lora_rank / tensor, model.moe_intermediate_size / cut
    experts = model.num_experts_per_tok + 1
    attention_in = hidden + latent + heads + groups
    experts_in = experts * (hidden + wide)
    outputs = latent + model.head_dim + heads + groups + hidden + experts * (2 * wide + hidden)
    kept, once = item + 2, item + 1
    row = (attention_in + experts_in + outputs) * kept
    row += attention_in * once * multiplies_again(cfg, "attention")
    row += experts_in * once * multiplies_again(cfg, "routed experts")
    used = [weight for weight in weights_of(model) if weight.uses and weight.part in FP8]
    matrices = sum(
        weight.size
        / cut_of(weight, rules, sizes).others
        * (kept + once * multiplies_again(cfg, weight.part))
        for weight in used
    )
    return [
        Term("hbm", "fp8 operands", row * layers, "tokens"),
        Term("hbm", "fp8 operands", matrices),
    ]


def _orthogonalise(stack: Stack) -> list[Term]:
    """Newton-Schulz on one stack of matrices: 4 m^2 n + 2 m^3 FLOPs a step, m <= n."""
    m, n = sorted(stack.shape)
    flops = len(COEFFICIENTS) * (4 * m * m * n + 2 * m**3) * stack.count
    moved = len(COEFFICIENTS) * 4 * (5 * m * n + 4 * m * m) * stack.count
    return [Term("flops", "optimizer", flops), Term("hbm", "optimizer", moved)]
