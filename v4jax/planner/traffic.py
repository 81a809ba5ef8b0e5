"""Estimates what one device sends in a training step: bytes by mesh axes and collective.

The rules restate what the program asks for: sharding/rules.py gathers weights, sharding/experts.py
and exchange.py move tokens, sharding/matrices.py moves matrices. They also restate what XLA makes
of it, as seen in compiled programs; benchmarks/layout_accuracy.py compares. Bytes are counted as in
sharding/audit.py.

Next file to read: v4jax/planner/memory.py.
"""

import math
from collections.abc import Iterable, Mapping

from sharding.exchange import round_rows
from sharding.rules import MESH_AXES, AxisRules
from v4jax.config import CSA, HCA
from v4jax.planner.muon import muon
from v4jax.planner.terms import Term
from v4jax.planner.weights import Cut, Weight, cut_of, weights_of
from v4jax.planner.work import layers_by_ratio, part_of
from v4jax.train.config import TrainConfig

_CSA_ROWS = 2 * (CSA - 1) + (2 * CSA - 1)
"""Positions, each one head wide, that a shard of a CSA layer needs from before it.

3 for its own window, in both halves, and 7 for the window before."""

_LANES = 128
"""Numbers in one row of a TPU's registers."""


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
    for weight in weights_of(cfg.model):
        terms += _weight(
            cfg, weight, cut_of(weight, rules, sizes), tokens, axes["act_seq"], sizes, platform
        )
    terms += [
        _sent("optimizer", [axis], kind, size)
        for axis, kind, size in muon(cfg.model, rules, sizes).sent
    ]
    terms += experts_sent(cfg, rules, sizes, platform)
    terms += _tensor(cfg, rules, axes["act_heads"], sizes, platform)
    terms += _sequence(cfg, axes["act_seq"], sizes)
    return [term for term in terms + _embedding(cfg, rules, axes, sizes) if term.coefficient]


def _sent(
    part: str,
    axes: Iterable[str],
    kind: str,
    coefficient: float,
    basis: str = "one",
    calls: float = 1,
    least: float = 1,
) -> Term:
    return Term("sent", part, coefficient, basis, tuple(axes), kind, calls, least)


def _weight(
    cfg: TrainConfig,
    weight: Weight,
    cut: Cut,
    tokens: list[str],
    seq: list[str],
    sizes,
    platform: str,
) -> list[Term]:
    """What one weight sends: it is gathered where it is used, and its gradient is summed."""
    if weight.optimizer == "none":
        return []
    item = 4 if weight.float32 or cfg.dtype == "float32" else 2
    times = 1 if weight.name.startswith("head/") or not cfg.remat else 2
    # Rows of the embedding table are looked up where they lie.
    cut_tokens = (
        []
        if weight.name.startswith("embed/")
        else [axis for axis in tokens if axis in cut.token_axes]
    )
    terms = weight_gathered(weight, cut, cut_tokens, item, sizes, times)
    if weight.optimizer == "frozen":
        return terms
    return terms + _gradient(cfg, weight, cut, cut_tokens, tokens, seq, sizes, platform)


def weight_gathered(
    weight: Weight, cut: Cut, axes: list[str], item: float, sizes, times: int = 1
) -> list[Term]:
    """A weight, gathered `times` times over `axes`.

    The outermost axis moves the whole weight, each further axis a part of it.
    """
    whole, terms = weight.size / cut.others * item, []
    for step in [axes] if weight.is_expert and axes else [[axis] for axis in axes]:
        n = math.prod(sizes[axis] for axis in step)
        terms.append(
            _sent(
                part_of(weight.name),
                step,
                "all-gather",
                times * whole * (n - 1) / n,
                calls=times * weight.layers,
            )
        )
        whole /= n
    return terms


def _gradient(
    cfg,
    weight: Weight,
    cut: Cut,
    scattered: list[str],
    tokens: list[str],
    seq: list[str],
    sizes,
    platform: str,
) -> list[Term]:
    """The sum of a weight's gradient over devices with other tokens.

    It is scattered where the weight is cut, and summed in full elsewhere.
    """
    part, numbers = part_of(weight.name), weight.size / cut.others
    table = weight.name.startswith("embed/")
    item = 4 if weight.float32 or weight.is_expert or table or cfg.dtype == "float32" else 2
    held = [axis for part_ in cut.parts for axis in part_]
    rest = [axis for axis in tokens if axis not in scattered and axis not in held]
    n, r = (math.prod(sizes[axis] for axis in axes) for axes in (scattered, rest))
    if platform == "cpu" and not weight.is_expert and not table:
        # XLA:CPU sums over all axes at once and cuts afterwards. A weight that is not cut is summed
        # over the sequence first and then over the batch.
        both = [axis for axis in tokens if axis in scattered + rest]
        layers_own = weight.uses and not scattered and not weight.name.startswith("head/")
        steps = (
            [[a for a in both if a in seq], [a for a in both if a not in seq]]
            if layers_own
            else [both]
        )
        counts = [math.prod(sizes[axis] for axis in step) for step in steps]
        return [
            _sent(part, step, "all-reduce", 2 * numbers * item * (c - 1) / c, calls=weight.layers)
            for step, c in zip(steps, counts, strict=True)
        ]
    terms = []
    if scattered:
        # Some sums are made in full, at twice the bytes, and a part is kept: the head's always; on
        # XLA:TPU also those of experts over all devices, and of other weights over several axes.
        odd = (
            (n == math.prod(sizes.values()))
            if weight.is_expert
            else len(scattered) > 1 and not table
        )
        full = (platform == "tpu" and odd) or weight.name.startswith("head/")
        kind = "all-reduce" if full else "reduce-scatter"
        terms.append(
            _sent(
                part,
                scattered,
                kind,
                (1 + full) * numbers * item * (n - 1) / n,
                "one",
                weight.layers,
                1 / (1 + full),
            )
        )
    if rest:  # experts are summed over the other axes while they are whole
        left = numbers * item / (cut.tokens if table else 1 if weight.is_expert else n)
        terms.append(_sent(part, rest, "all-reduce", 2 * left * (r - 1) / r, calls=weight.layers))
    return terms


def experts_sent(
    cfg: TrainConfig, rules: AxisRules, sizes, platform: str, what: str = "train"
) -> list[Term]:
    """What is sent to bring tokens to experts and back.

    In training they travel forward, again where layers are rematerialised, and once each way as
    gradients.
    """
    model = cfg.model
    holders = [axis for axis in rules.mesh_axes("experts") if sizes[axis] > 1]
    n = math.prod(sizes[axis] for axis in holders)
    if n == 1:
        return []
    decodes = what == "decode"
    ways, basis = (1, "rows") if decodes else (3 if cfg.remat else 2, "tokens")
    times = ways * (
        sum(layers_by_ratio(model).values()) - (model.num_nextn_predict_layers if decodes else 0)
    )
    row = times * model.hidden_size * (4 if cfg.dtype == "float32" else 2)
    if not rules.exchange:
        kinds = ("all-gather", "reduce-scatter")
        return [
            _sent("routed experts", holders, kind, row * (n - 1), basis, times) for kind in kinds
        ]
    row *= model.num_experts_per_tok
    # Every device gathers all rows; on the way back they have headroom.
    if platform == "cpu":
        cuts = rules.mesh_axes("act_batch") + (() if decodes else rules.mesh_axes("act_seq"))
        assignments = (
            cfg.batch_size
            * (1 if decodes else cfg.seq_len)
            * model.num_experts_per_tok
            // math.prod(sizes[axis] for axis in cuts)
        )
        return [
            _sent(
                "routed experts",
                holders,
                "all-gather",
                row * (n - 1) * (1 + round_rows(assignments) / assignments),
                basis,
                2 * times,
            )
        ]
    # A TPU moves whole lanes.
    gates = times * model.num_experts_per_tok * 4 * (_LANES if platform == "tpu" else 1)
    return [
        _sent(
            "routed experts", holders, "ragged-all-to-all", 2 * row * (n - 1) / n, basis, 2 * times
        ),
        _sent("gates", holders, "ragged-all-to-all", gates * (n - 1) / n, basis, times, 0),
    ]


def _tensor(
    cfg: TrainConfig, rules: AxisRules, tensor: list[str], sizes, platform: str
) -> list[Term]:
    """Partial sums of heads, experts and vocabulary, added over the devices that share a token."""
    n = math.prod(sizes[axis] for axis in tensor)
    if n == 1:
        return []
    model, item = cfg.model, 4 if cfg.dtype == "float32" else 2
    layers = layers_by_ratio(model)
    count, inner = sum(layers.values()), _inner(cfg)
    # Forward: attention, routed and shared experts. Backward: the inputs of the three; on CPUs
    # those of w1 and w3 of the shared expert apart. Elsewhere XLA adds the outputs of routed and
    # shared experts before it sums, and so sums once (backward, twice in the last layer of a
    # pattern), unless tokens travel to experts first.
    apart = (3, 1 + 2 * inner, 4 if platform == "cpu" else 3)
    forward, again, backward = (
        apart if platform == "cpu" or rules.exchange else (2, 1 + inner, 2 - inner)
    )
    wide = (
        (forward + (again if cfg.remat else 0) + backward) * model.hidden_size
        + model.q_lora_rank
        + model.head_dim
    )
    wide += model.num_experts_per_tok  # gradients of gates
    last = (1 + model.num_nextn_predict_layers) * model.hidden_size
    ring = 2 * (n - 1) / n
    terms = [
        _sent(
            "tensor sums",
            tensor,
            "all-reduce",
            ring * item * (wide * count + last),
            "tokens",
            6 * count,
        )
    ]
    entries = ((layers[CSA], "csa_entries"), (layers[HCA], "hca_entries"))
    terms += [
        _sent("attention", tensor, "all-reduce", ring * item * model.head_dim * k, basis, k)
        for k, basis in entries
        if k
    ]
    # Index scores are summed before entries are chosen.
    if [axis for axis in rules.mesh_axes("index_heads") if sizes[axis] > 1]:
        times = (2 if cfg.remat else 1) * layers[CSA]
        terms.append(_sent("indexers", tensor, "all-reduce", ring * 4 * times, "csa_scored", times))
    return terms


def _inner(cfg: TrainConfig) -> float:
    """Share of layers whose expert sums the backward pass recomputes: all but a pattern's last."""
    groups = cfg.model.layer_groups
    layers = (
        sum(len(group.kinds) * group.repeats for group in groups)
        + cfg.model.num_nextn_predict_layers
    )
    return (
        1 - (sum(group.repeats for group in groups) + cfg.model.num_nextn_predict_layers) / layers
    )


def _sequence(cfg: TrainConfig, axes: list[str], sizes) -> list[Term]:
    """What devices send where a sequence is cut.

    These are positions before a shard, from the neighbour; entries of all devices; sums of the
    entries' gradients; and expert choices for the balance loss.
    """
    n = math.prod(sizes[axis] for axis in axes)
    if n == 1:
        return []
    model, item = cfg.model, 4 if cfg.dtype == "float32" else 2
    layers = layers_by_ratio(model)
    times = 2 if cfg.remat else 1
    # The window of attention, then the compressors' float32 projections and gates of windows that
    # end in this shard. CSA pools two windows, in two halves.
    halo = model.sliding_window * model.head_dim * item * sum(layers.values()) * (times + 1)
    pooled = (
        2 * 4 * (times + 1) * model.head_dim * (layers[HCA] * (HCA - 1) + layers[CSA] * _CSA_ROWS)
    )
    terms = [
        _sent(
            "attention",
            axes,
            "collective-permute",
            halo,
            "rows",
            (times + 1) * sum(layers.values()),
        )
    ]
    terms.append(
        _sent(
            "compressors",
            axes,
            "collective-permute",
            pooled,
            "rows",
            2 * (times + 1) * (layers[HCA] + 2 * layers[CSA]),
        )
    )
    index = 2 * 4 * times * model.index_head_dim * layers[CSA] * _CSA_ROWS
    terms.append(
        _sent("indexers", axes, "collective-permute", index, "rows", 4 * times * layers[CSA])
    )
    # The balance loss of a sequence needs the choices of all its tokens.
    chosen = 4 * times * model.num_experts_per_tok * sum(layers.values()) * (n - 1)
    terms.append(_sent("gates", axes, "all-gather", chosen, "tokens", times * sum(layers.values())))
    share = (n - 1) / n * item
    for ratio, basis in ((CSA, "csa_entries"), (HCA, "hca_entries")):
        terms.append(
            _sent(
                "compressors",
                axes,
                "all-gather",
                share * times * model.head_dim * layers[ratio],
                basis,
                times * layers[ratio],
            )
        )
        terms.append(
            _sent(
                "compressors",
                axes,
                "all-reduce",
                2 * share * model.head_dim * layers[ratio],
                basis,
                layers[ratio],
            )
        )
    keys = share * times * model.index_head_dim * layers[CSA]
    return [*terms, _sent("indexers", axes, "all-gather", keys, "csa_entries", times * layers[CSA])]


def _embedding(cfg: TrainConfig, rules: AxisRules, axes: dict[str, list[str]], sizes) -> list[Term]:
    """Rows of the embedding table for the tokens, and for MTP's next tokens.

    Devices along the vocabulary's axes add partial rows; those along the width's swap columns.
    """
    model = cfg.model
    width = [
        axis
        for axis in rules.mesh_axes("embed")
        if sizes[axis] > 1 and axis in axes["act_batch"] + axes["act_seq"]
    ]
    words = axes["vocab"]
    times, n, v = (
        1 + model.num_nextn_predict_layers,
        math.prod(sizes[a] for a in width),
        math.prod(sizes[a] for a in words),
    )
    row = times * model.hidden_size * 4
    return [
        _sent("embedding", words, "all-reduce", row * 2 * (v - 1) / v, "tokens", times),
        _sent(
            "embedding",
            width,
            "all-to-all",
            row * (n - 1) / n * (2 if cfg.dtype == "float32" else 1.5),
            "tokens",
            2 * times,
        ),
    ]
