"""What is alive at the peak of the backward pass on TPUs, where the fused kernels run.

At the peak the experts of one layer are at work, and everything that the layers before it keep is
still there. The arrays were read off XLA:TPU's programs; each line below names its own, and
benchmarks/README.md says in which programs. Scores, and what mHC makes inside, never leave the
kernels.

Shapes: D hidden, X streams, N heads, H head dim, G output groups, O output rank, Q latent of the
queries, F expert hidden. A row is an assignment of a token to an expert.

Next file to read: v4jax/planner/estimate.py.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from sharding.exchange import HEADROOM
from sharding.rules import AxisRules
from v4jax.planner import adapted
from v4jax.planner.terms import Term
from v4jax.planner.weight_traffic import bytes_in_products
from v4jax.planner.weights import Weight, cut_of, weights_of
from v4jax.remat import ATTENTION, EXPERTS, LAYERS, POLICIES
from v4jax.train.config import TrainConfig

WORKING = ("layers", "experts")
"""Moments of a layer's experts: their rows are many; gradients of their matrices are made."""
_OF_MATRICES = "gradients of matrices"
BLOCK = 128
"""Rows of a block; an expert's last block is filled up (sharding/experts.py)."""


class Rows(NamedTuple):
    """The rows of experts on one device.

    Attributes:
      travel: whether rows are exchanged; otherwise their tokens are gathered.
      sent: for each token of the device, rows that it sends, or that lie in what is gathered.
      landed: for each token of the device, rows in the experts' buffers.
      filler: rows that fill up the last block of each expert.
      matrix: numbers of one of a layer's three matrices of experts.
      hidden: F, as far as this device has it.
    """

    travel: bool
    sent: float
    landed: float
    filler: float
    matrix: float
    hidden: float


class LayerBytes(NamedTuple):
    """Bytes that one layer keeps: for each token, for each row of experts, and of weights."""

    token: float
    row: float
    weights: float


def rows_of(cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int]) -> Rows:
    """How the layout brings tokens to experts."""
    model = cfg.model
    holders = _parts(rules, sizes, "experts")
    here = model.n_routed_experts / holders
    hidden = model.moe_intermediate_size / _parts(rules, sizes, "expert_hidden")
    travel = rules.exchange and holders > 1
    # Without an exchange the buffers hold the tokens of all devices that share the experts.
    sent = model.num_experts_per_tok * (1 if travel else holders)
    landed = sent * HEADROOM if travel else sent
    return Rows(travel, sent, landed, here * BLOCK, here * hidden * model.hidden_size, hidden)


def kept_terms(cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int]) -> list[Term]:
    """What every layer keeps, of kind "activations", where layers are not recomputed as a whole."""
    model, rows = cfg.model, rows_of(cfg, rules, sizes)
    looped = sum(len(g.kinds) * g.repeats for g in model.layer_groups if in_loop(cfg, g.repeats))
    unrolled = model.num_hidden_layers - looped
    terms = []
    for layers, kept in (
        (looped, _kept_in_a_loop(cfg, rules, sizes)),
        (unrolled, _kept_unrolled(cfg, rules, sizes)),
    ):
        terms += _of_layers("activations", layers, kept, rows)
    return terms


def working_terms(cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int]) -> list[Term]:
    """The working sets of the kinds WORKING."""
    model, rows, item = cfg.model, rows_of(cfg, rules, sizes), _item(cfg)
    width = model.hidden_size * item
    streams = Term("", "gradient of the streams", 2 * model.hc_mult * width, "tokens")
    both = [streams, *adapted.read_now(cfg, rows.matrix, item)]
    both += [] if cfg.lora is not None else _head(cfg, rules, sizes, item)
    pattern = max(len(group.kinds) for group in model.layer_groups)
    if POLICIES[cfg.remat].part == LAYERS:
        kept = kept_by_a_layer(cfg, rules, sizes)
        both += _of_layers("", pattern, kept, rows)
    elif any(in_loop(cfg, group.repeats) for group in model.layer_groups):
        both += _beside_a_loop(cfg, rules, sizes, pattern)
    terms = [term._replace(kind=kind) for term in both for kind in WORKING]
    made = (_travelling if rows.travel else _gathered)(rows, width)
    return terms + [t for t in made if cfg.lora is None or t.part != _OF_MATRICES]


def _travelling(rows: Rows, width: int) -> list[Term]:
    """What the backward pass of experts makes in a further round of the exchange.

    First the gradients of its rows, on both sides of the experts, and those that go home in the
    order in which rows landed, beside the first round's gradients of matrices. Then the gradient of
    one more matrix, beside rows' gradients and the buffer in which they come home.
    """
    return [
        Term("layers", "rows", 3 * width * rows.landed, "tokens"),
        Term("layers", "filler", 2 * width * rows.filler),
        Term("layers", _OF_MATRICES, 3 * 4 * rows.matrix),
        Term("experts", "rows", width * (rows.sent + rows.landed), "tokens"),
        Term("experts", "filler", width * rows.filler),
        Term("experts", _OF_MATRICES, 4 * 4 * rows.matrix),
    ]


def _gathered(rows: Rows, width: int) -> list[Term]:
    """What experts make whose tokens are gathered, at the end of the recomputed forward pass.

    There are their results, and those of each token, one choice beside the other. The gradients of
    matrices come when nothing reads the matrices any more, and each is cut as soon as it is made,
    so they need no more.
    """
    return [
        Term("layers", "rows", 2 * width * rows.landed, "tokens"),
        Term("layers", "filler", width * rows.filler),
    ]


def is_late(cfg: TrainConfig, weight: Weight) -> bool:
    """Whether a weight's gradient is made after the peak, or counted there in another form.

    Sums of micro-batches are there from the start. Without them, the embedding's gradient comes
    last unless MTP looks tokens up too, that of the head is not yet cut, and the gradients of
    layers that no loop holds grow only as fast as what they were made from goes.
    """
    if cfg.micro_batches > 1:
        return False
    if weight.part == "embedding":
        return cfg.model.num_nextn_predict_layers == 0
    if POLICIES[cfg.remat].part == LAYERS or weight.axes[:1] != ("layers",):
        return weight.part == "head"
    return not in_loop(cfg, weight.layers)


def in_loop(cfg: TrainConfig, repeats: int) -> bool:
    """Whether a group of layers is a loop in the program (v4jax/model/block.py)."""
    return repeats > (2 if cfg.remat == "none" else 1)


def kept_by_a_layer(cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int]) -> LayerBytes:
    """What a layer keeps, in the forward pass that the backward pass has just recomputed."""
    model, rows, item = cfg.model, rows_of(cfg, rules, sizes), _item(cfg)
    heads, hidden = _parts(rules, sizes, "act_heads"), _parts(rules, sizes, "act_hidden")
    D, F = model.hidden_size, model.moe_intermediate_size
    wide, shared = model.num_attention_heads * model.head_dim / heads, F / hidden
    token = (
        2 * model.hc_mult * D  # the streams that the two sites of mHC read
        + wide  # attention's output
        + 5 * D  # what the sites give, as it is and normalised; the experts' sum
        + shared  # the shared expert's activation
    )
    if cfg.remat != "dots":  # which keeps products for the whole step: they are read in place
        token += wide + model.q_lora_rank  # queries
        token += model.head_dim  # keys
        token += model.o_groups * model.o_lora_rank / heads + D  # the output's two products
        token += 2 * shared + D  # the shared expert's products
    row = D + 3 * rows.hidden  # inputs, two products with matrices, and the activation
    weights = 3 * rows.matrix * adapted.expert_bytes(cfg, item) + _weights(cfg, rules, sizes)
    pairs = adapted.row_bytes(cfg, rows.hidden, BLOCK, item, 4)
    return LayerBytes(token * item, row * item + pairs, weights)


def _kept_unrolled(cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int]) -> LayerBytes:
    """What a layer keeps until the backward pass; norms keep their inputs in float32 too."""
    kept = kept_by_a_layer(cfg, rules, sizes)
    return kept._replace(token=kept.token + 2 * 4 * cfg.model.hidden_size)


def _kept_in_a_loop(cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int]) -> LayerBytes:
    """What a layer of a loop keeps: all that its gradient reads, in the dtype that it has there.

    So gathered matrices of experts are kept in float32, and norms and the shared expert keep
    float32 numbers.
    """
    model, rows, item = cfg.model, rows_of(cfg, rules, sizes), _item(cfg)
    part, heads = POLICIES[cfg.remat].part, _parts(rules, sizes, "act_heads")
    D, F = model.hidden_size, model.moe_intermediate_size / _parts(rules, sizes, "act_hidden")
    token = 2 * model.hc_mult * D * item + 5 * D * 4 + 4 * D * item
    row = weights = 0.0
    if part != ATTENTION:
        wide = model.num_attention_heads * model.head_dim / heads
        narrow = model.o_groups * model.o_lora_rank / heads
        token += (3 * wide + 2 * narrow) * item  # queries; outputs in two layouts, both times
        token += 2 * (model.q_lora_rank + model.head_dim) * (4 + item)
        weights += _weights(cfg, rules, sizes)
    if part != EXPERTS:
        token += D * item + 8 * F * 4
        row = (D + 2 * rows.hidden) * item
        if any(cut_of(w, rules, sizes).tokens > 1 for w in weights_of(model) if w.is_expert):
            weights += 3 * rows.matrix * 4
    return LayerBytes(token, row, weights)


def _beside_a_loop(cfg: TrainConfig, rules, sizes, pattern: int) -> list[Term]:
    """What the backward pass of a loop's pattern makes beside all that its layers keep.

    Its layers' gradients of experts are cut only at the end of the pattern.
    """
    model, rows, item = cfg.model, rows_of(cfg, rules, sizes), _item(cfg)
    part = POLICIES[cfg.remat].part
    # A further round, or recomputed experts, have rows of their own.
    row = (model.hidden_size + 3 * rows.hidden) * item if rows.travel or part == EXPERTS else 0.0
    wide = model.num_attention_heads * model.head_dim / _parts(rules, sizes, "act_heads")
    # The queries' gradient, and outputs where attention was recomputed.
    wide *= (2 if part == ATTENTION else 1) * item
    return [
        Term("", "matrices in the compute dtype", 3 * rows.matrix * item),
        Term("", "gradients of the pattern's other layers", 3 * 4 * rows.matrix * (pattern - 1)),
        Term("", "rows", row * rows.landed, "tokens"),
        Term("", "filler", row * rows.filler),
        Term("", "queries and outputs", wide, "tokens"),
    ]


def _of_layers(kind: str, layers: int, kept: LayerBytes, rows: Rows) -> list[Term]:
    return [
        Term(kind, "gathered weights", layers * kept.weights),
        Term(kind, "kept by tokens", layers * kept.token, "tokens"),
        Term(kind, "kept by rows", layers * kept.row * rows.landed, "tokens"),
        Term(kind, "kept by filler", layers * kept.row * rows.filler),
    ]


def _head(cfg: TrainConfig, rules: AxisRules, sizes, item: int) -> list[Term]:
    """Gradients of the head that are still whole: XLA adds and cuts them after the layers.

    Micro-batches add the head's gradient to its sum at once, unless MTP has one too.
    """
    mtp = cfg.model.num_nextn_predict_layers
    count = 1 if cfg.micro_batches == 1 else 2 * mtp
    numbers = cfg.model.hidden_size * cfg.model.vocab_size / _parts(rules, sizes, "vocab")
    return [Term("", "the head's gradient", count * numbers * item)]


def relaid(cfg: TrainConfig, weight: Weight, rules: AxisRules, sizes) -> list[Term]:
    """A copy of `weight` in row-major order, and what that order adds to its sum of gradients.

    With micro-batches products and sums have weights in row-major order (v4jax/gradient_sums.py).
    XLA keeps a weight with that of its last two axes innermost that is padded least: the innermost
    to a multiple of 128, the next to one of 8. If that is not the last axis, a copy lies beside the
    weight until the optimizer runs.
    """
    summed = cfg.micro_batches > 1 and cfg.lora is None  # adapters' sums are added whole
    if not summed or len(weight.shape) < 2 or weight.optimizer not in ("muon", "adamw"):
        return []
    cut = cut_of(weight, rules, sizes)
    rows, columns = (
        size // math.prod(sizes[axis] for axis in axes)
        for size, axes in zip(weight.shape[-2:], cut.parts[-2:], strict=True)
    )
    given = _padded(rows, columns)
    if given <= _padded(columns, rows):
        return []
    others = 4 * weight.size / cut.devices / (rows * columns)
    copies = [
        Term(kind, f"{weight.name}, row-major", others * given) for kind in (*WORKING, "head")
    ]
    added = others * (given - rows * columns)
    return [*copies, Term("gradients", f"{weight.name}, padding", added)]


def _padded(rows: int, columns: int) -> int:
    return -(-rows // 8) * 8 * (-(-columns // 128) * 128)


def _weights(cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int]) -> float:
    """Bytes of an average layer's weights other than experts, as its products use them."""
    found: dict[str, float] = {}
    for weight in weights_of(cfg.model):
        if weight.axes[:1] == ("layers",) and not weight.is_expert and weight.optimizer != "none":
            layer = "/".join(weight.name.split("/")[:2])  # group and block
            size = weight.size / weight.layers / cut_of(weight, rules, sizes).others
            found[layer] = found.get(layer, 0) + size * bytes_in_products(cfg, weight)
    return sum(found.values()) / len(found) + adapted.spread_scales(cfg, rules, sizes)


def _item(cfg: TrainConfig) -> int:
    return 4 if cfg.dtype == "float32" else 2


def _parts(rules: AxisRules, sizes: Mapping[str, int], name: str) -> int:
    return math.prod(sizes[axis] for axis in rules.mesh_axes(name))
