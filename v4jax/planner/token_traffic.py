"""Estimates what activations send: to experts, and where heads, sequences or the table are cut.

Next file to read: v4jax/planner/memory.py.
"""

import math
from collections.abc import Mapping

from sharding.exchange import round_rows
from sharding.rules import AxisRules
from v4jax.config import CSA, HCA
from v4jax.kernels.tpu import LANES
from v4jax.planner.recompute import recomputes
from v4jax.planner.terms import Term, sent
from v4jax.planner.work import layers_by_ratio
from v4jax.remat import LAYERS, POLICIES
from v4jax.train.config import TrainConfig

_CSA_ROWS = 2 * (CSA - 1) + (2 * CSA - 1)
"""Positions, each one head wide, that a shard of a CSA layer needs from before it.

3 for its own window, in both halves, and 7 for the window before."""


def experts_sent(
    cfg: TrainConfig, rules: AxisRules, sizes: Mapping[str, int], platform: str, what: str = "train"
) -> list[Term]:
    """What is sent to bring tokens to experts and back.

    In training they travel forward, again where experts are recomputed, and once each way as
    gradients.
    """
    model = cfg.model
    holders = [axis for axis in rules.mesh_axes("experts") if sizes[axis] > 1]
    n = math.prod(sizes[axis] for axis in holders)
    if n == 1:
        return []
    decodes = what == "decode"
    ways, basis = (
        (1, "rows") if decodes else (3 if recomputes(cfg, "routed experts") else 2, "tokens")
    )
    times = ways * (
        sum(layers_by_ratio(model).values()) - (model.num_nextn_predict_layers if decodes else 0)
    )
    row = times * model.hidden_size * (4 if cfg.dtype == "float32" else 2)
    if not rules.exchange:
        kinds = ("all-gather", "reduce-scatter")
        return [
            sent("routed experts", holders, kind, row * (n - 1), basis, times) for kind in kinds
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
            sent(
                "routed experts",
                holders,
                "all-gather",
                row * (n - 1) * (1 + round_rows(assignments) / assignments),
                basis,
                2 * times,
            )
        ]
    # A TPU moves whole lanes.
    gates = times * model.num_experts_per_tok * 4 * (LANES if platform == "tpu" else 1)
    return [
        sent(
            "routed experts", holders, "ragged-all-to-all", 2 * row * (n - 1) / n, basis, 2 * times
        ),
        sent("gates", holders, "ragged-all-to-all", gates * (n - 1) / n, basis, times, 0),
    ]


def sums_sent(
    cfg: TrainConfig, rules: AxisRules, tensor: list[str], sizes: Mapping[str, int], platform: str
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
        (forward + again * (POLICIES[cfg.remat].part == LAYERS) + backward) * model.hidden_size
        + model.q_lora_rank
        + model.head_dim
    )
    wide += model.num_experts_per_tok  # gradients of gates
    last = (1 + model.num_nextn_predict_layers) * model.hidden_size
    ring = 2 * (n - 1) / n
    terms = [
        sent(
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
        sent("attention", tensor, "all-reduce", ring * item * model.head_dim * k, basis, k)
        for k, basis in entries
        if k
    ]
    # Index scores are summed before entries are chosen.
    if [axis for axis in rules.mesh_axes("index_heads") if sizes[axis] > 1]:
        times = (2 if recomputes(cfg, "indexers") else 1) * layers[CSA]
        terms.append(sent("indexers", tensor, "all-reduce", ring * 4 * times, "csa_scored", times))
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


def sequence_sent(cfg: TrainConfig, axes: list[str], sizes: Mapping[str, int]) -> list[Term]:
    """What devices send where a sequence is cut.

    These are positions before a shard, from the neighbour; entries of all devices; sums of the
    entries' gradients; and expert choices for the balance loss.
    """
    n = math.prod(sizes[axis] for axis in axes)
    if n == 1:
        return []
    layers = sum(layers_by_ratio(cfg.model).values())
    times = 2 if recomputes(cfg, "gates") else 1
    # The balance loss of a sequence needs the choices of all its tokens.
    chosen = 4 * times * cfg.model.num_experts_per_tok * layers * (n - 1)
    return [
        *_halos(cfg, axes),
        sent("gates", axes, "all-gather", chosen, "tokens", times * layers),
        *_entries(cfg, axes, n),
    ]


def _halos(cfg: TrainConfig, axes: list[str]) -> list[Term]:
    """Positions before a shard, sent by the neighbour.

    The window of attention, then the compressors' float32 projections and gates of windows that end
    in this shard. CSA pools two windows, in two halves.
    """
    model, item = cfg.model, 4 if cfg.dtype == "float32" else 2
    layers = layers_by_ratio(model)
    count = sum(layers.values())
    times = 2 if recomputes(cfg, "attention") else 1
    window = model.sliding_window * model.head_dim * item * count * (times + 1)
    rows = layers[HCA] * (HCA - 1) + layers[CSA] * _CSA_ROWS
    pooled = 2 * 4 * (times + 1) * model.head_dim * rows
    calls = 2 * (times + 1) * (layers[HCA] + 2 * layers[CSA])
    index = 2 * 4 * times * model.index_head_dim * layers[CSA] * _CSA_ROWS
    kind = "collective-permute"
    return [
        sent("attention", axes, kind, window, "rows", (times + 1) * count),
        sent("compressors", axes, kind, pooled, "rows", calls),
        sent("indexers", axes, kind, index, "rows", 4 * times * layers[CSA]),
    ]


def _entries(cfg: TrainConfig, axes: list[str], n: int) -> list[Term]:
    """Entries and index keys, gathered from all `n` shards, and the sums of entries' gradients."""
    model, item = cfg.model, 4 if cfg.dtype == "float32" else 2
    layers = layers_by_ratio(model)
    times = 2 if recomputes(cfg, "attention") else 1
    share = (n - 1) / n * item
    terms = []
    for ratio, basis in ((CSA, "csa_entries"), (HCA, "hca_entries")):
        count = layers[ratio]
        entries = share * times * model.head_dim * count
        gradients = 2 * share * model.head_dim * count
        terms += [
            sent("compressors", axes, "all-gather", entries, basis, times * count),
            sent("compressors", axes, "all-reduce", gradients, basis, count),
        ]
    keys = share * times * model.index_head_dim * layers[CSA]
    return [*terms, sent("indexers", axes, "all-gather", keys, "csa_entries", times * layers[CSA])]


def embedding_sent(
    cfg: TrainConfig, rules: AxisRules, axes: dict[str, list[str]], sizes: Mapping[str, int]
) -> list[Term]:
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
    times = 1 + model.num_nextn_predict_layers
    n, v = (math.prod(sizes[axis] for axis in axes_) for axes_ in (width, words))
    row = times * model.hidden_size * 4
    sums = row * 2 * (v - 1) / v
    swaps = row * (n - 1) / n * (2 if cfg.dtype == "float32" else 1.5)
    return [
        sent("embedding", words, "all-reduce", sums, "tokens", times),
        sent("embedding", width, "all-to-all", swaps, "tokens", 2 * times),
    ]
