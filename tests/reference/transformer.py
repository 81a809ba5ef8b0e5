"""The whole model, restated: forward(cfg, weights, tokens) -> logits, MTP logits, routing.

Plain NumPy from docs/equations.md, sections 2 to 9; the oracle of the tests, written from the
equations, slow on purpose. `weights` maps official tensor names
(docs/equations.md#checkpoint-names) to arrays in official orientation, matrices [out, in]. Packed
rows are cut into documents and each document runs ALONE from position 0, so "packed equals
separate" holds here by construction. All arithmetic is float64.

Legend: B rows, S positions, X streams, D hidden, E experts, K active experts, V vocabulary, L main
layers.
Next file to read: hyper.py.
"""

from typing import NamedTuple

import numpy as np

from v4jax.config import WINDOW_ONLY, ModelConfig

from . import attention, hyper, low, moe


class Output(NamedTuple):
    """What a forward pass gives. Lists have one item per main layer, and a last one for MTP, if
    any.

    No load and no balance counts tokens of segment 0 (padding). The MTP layer's also leave out each
    document's last position, which has no next token. `routing` (with rows put together again,
    [B*S, .]) lets a test count otherwise.
    """

    logits: np.ndarray  # float64 [B, S, V]
    mtp_logits: np.ndarray | None  # float64 [B, S, V]; position t predicts token t+2
    load: list[np.ndarray]  # int64 [E] each
    balance: list[np.ndarray]  # float64 [B] each: one row is one sequence
    routing: list[moe.Routing]


class Document(NamedTuple):
    """One document's logits [S, V], MTP logits [S, V] or None, and routing per layer (MTP last)."""

    logits: np.ndarray
    mtp_logits: np.ndarray | None
    routing: list[moe.Routing]


def forward(cfg: ModelConfig, weights: dict, tokens_BS, segment_ids_BS=None) -> Output:
    """The model on a batch of rows; without segment ids each row is one document.

    `low.served(weights)` makes it the served model.

    Raises:
      ValueError: a token id outside the vocabulary.
    """
    tokens_BS = np.asarray(tokens_BS)
    if tokens_BS.min() < 0 or tokens_BS.max() >= cfg.vocab_size:
        raise ValueError(
            f"tokens: got {tokens_BS.min()}..{tokens_BS.max()}; allowed: 0..{cfg.vocab_size - 1}"
        )
    segments_BS = np.ones_like(tokens_BS) if segment_ids_BS is None else np.asarray(segment_ids_BS)
    weights = type(weights)(
        (name, np.asarray(w, np.int64 if name.endswith("tid2eid") else np.float64))
        for name, w in weights.items()
    )
    rows = [
        _row(cfg, weights, tokens_S, segments_S)
        for tokens_S, segments_S in zip(tokens_BS, segments_BS, strict=True)
    ]
    counted = np.repeat((segments_BS != 0)[None], len(rows[0].routing), axis=0)  # [L or L+1, B, S]
    if cfg.num_nextn_predict_layers:
        for b, segments_S in enumerate(segments_BS):
            counted[-1, b, [stop - 1 for _, stop in documents(segments_S)]] = False
    balance, routing = [], []
    for layer, mask_BS in enumerate(counted):
        balance.append(
            np.array(
                [
                    moe.balance(row.routing[layer], mask)
                    for row, mask in zip(rows, mask_BS, strict=True)
                ]
            )
        )
        routing.append(_join([row.routing[layer] for row in rows]))
    load = [moe.load(r, mask_BS.reshape(-1)) for r, mask_BS in zip(routing, counted, strict=True)]
    mtp_logits = (
        np.stack([row.mtp_logits for row in rows]) if cfg.num_nextn_predict_layers else None
    )
    return Output(np.stack([row.logits for row in rows]), mtp_logits, load, balance, routing)


def documents(segments_S: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of each maximal run of equal segment ids.

    Example: 1 1 2 0 0 -> (0, 2), (2, 3), (3, 5).
    """
    starts = [s for s in range(len(segments_S)) if s == 0 or segments_S[s] != segments_S[s - 1]]
    return list(zip(starts, starts[1:] + [len(segments_S)], strict=True))


def _row(cfg, weights, tokens_S, segments_S) -> Document:
    """One packed row: its documents run alone, and their results are joined."""
    parts = [
        forward_document(cfg, weights, tokens_S[start:stop])
        for start, stop in documents(segments_S)
    ]
    mtp_logits = (
        np.concatenate([p.mtp_logits for p in parts]) if cfg.num_nextn_predict_layers else None
    )
    routing = [_join(layer) for layer in zip(*(p.routing for p in parts), strict=True)]
    return Document(np.concatenate([p.logits for p in parts]), mtp_logits, routing)


def _join(routings) -> moe.Routing:
    return moe.Routing(*(np.concatenate(part) for part in zip(*routings, strict=True)))


def forward_document(cfg: ModelConfig, weights: dict, tokens_S: np.ndarray) -> Document:
    """One document from position 0; the embedding is copied into every stream."""
    embedded_SD = weights["embed.weight"][tokens_S]
    streams_SXD = np.repeat(embedded_SD[:, None], cfg.hc_mult, axis=1)
    routing = []
    for number in range(cfg.num_hidden_layers):
        ratio = cfg.compress_ratios[number]
        streams_SXD, layer_routing = block(
            cfg, weights, f"layers.{number}", ratio, streams_SXD, tokens_S
        )
        routing.append(layer_routing)
    x_SD = hyper.rms_norm(
        hyper.head(cfg, weights, "", streams_SXD), cfg.rms_norm_eps, weights["norm.weight"]
    )
    logits_SV = x_SD @ weights["head.weight"].T
    mtp_logits_SV = None
    if cfg.num_nextn_predict_layers:
        mtp_logits_SV, mtp_routing = mtp(cfg, weights, streams_SXD, tokens_S)
        routing.append(mtp_routing)
    return Document(logits_SV, mtp_logits_SV, routing)


def block(
    cfg, weights, name, compress_ratio, streams_SXD, tokens_S
) -> tuple[np.ndarray, moe.Routing]:
    """Attention, then MoE, each: collapse the streams, weighted RMSNorm, sublayer, expand and mix.

    The equations: docs/equations.md#block.
    """
    mix = hyper.mix(cfg, weights, f"{name}.hc_attn", streams_SXD)
    x_SD = hyper.collapse(mix.pre_SX, streams_SXD)
    x_SD = hyper.rms_norm(x_SD, cfg.rms_norm_eps, weights[f"{name}.attn_norm.weight"])
    x_SD = attention.attention(cfg, weights, f"{name}.attn", compress_ratio, x_SD)
    streams_SXD = hyper.expand(mix, x_SD, streams_SXD)

    mix = hyper.mix(cfg, weights, f"{name}.hc_ffn", streams_SXD)
    x_SD = hyper.collapse(mix.pre_SX, streams_SXD)
    x_SD = hyper.rms_norm(x_SD, cfg.rms_norm_eps, weights[f"{name}.ffn_norm.weight"])
    x_SD, routing = moe.moe(cfg, weights, f"{name}.ffn", x_SD, tokens_S)
    return hyper.expand(mix, x_SD, streams_SXD), routing


def mtp(
    cfg: ModelConfig, weights: dict, streams_SXD: np.ndarray, tokens_S: np.ndarray
) -> tuple[np.ndarray, moe.Routing]:
    """MTP logits [S, V], position t predicting token t+2, and the MTP layer's routing.

    The steps of docs/equations.md#mtp (and traps 31, 32):
      1. Position t reads token t+1 of the same document. The last position has none and takes
         token id 0, so its value means nothing.
      2. The embedding and the head are the main model's: no mtp.0.embed, no mtp.0.head.
      3. The streams are those after the last block, BEFORE hc_head and the final norm.
      4. The embedding, through enorm and e_proj, is copied to every stream; each stream goes by
         itself through hnorm (mean over D, not over X*D) and h_proj. No mHC mixing here.
      5. The block has its own hc sites and norms, window attention with rope_theta and no YaRN,
         gate.bias and no table.
      6. Its own collapse and its own final norm, then the shared head.
    """
    next_S = np.append(tokens_S[1:], 0)  # 1
    embedded_SD = weights["embed.weight"][next_S]  # 2
    e_SD = hyper.rms_norm(embedded_SD, cfg.rms_norm_eps, weights["mtp.0.enorm.weight"])
    e_SD = low.linear(weights, "mtp.0.e_proj", e_SD)
    x_SXD = np.empty_like(streams_SXD)
    for j in range(cfg.hc_mult):  # 3, 4
        h_SD = hyper.rms_norm(streams_SXD[:, j], cfg.rms_norm_eps, weights["mtp.0.hnorm.weight"])
        x_SXD[:, j] = e_SD + low.linear(weights, "mtp.0.h_proj", h_SD)
    x_SXD, routing = block(cfg, weights, "mtp.0", WINDOW_ONLY, x_SXD, next_S)  # 5
    x_SD = hyper.head(cfg, weights, "mtp.0.", x_SXD)  # 6
    x_SD = hyper.rms_norm(x_SD, cfg.rms_norm_eps, weights["mtp.0.norm.weight"])
    return x_SD @ weights["head.weight"].T, routing
