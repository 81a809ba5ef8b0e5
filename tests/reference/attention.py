"""Attention of the three kinds, restated.

One key-value head, window plus compressed entries, sink, grouped output. Plain NumPy from
docs/equations.md#attention and traps 8 to 14, one document, one query at a time. All arithmetic is
float64.

Legend: S tokens, T keys of one query, C entries, D hidden, N heads, H head dim, Q query rank, G
output groups, O output rank.
Next file to read: moe.py.
"""

import numpy as np

from v4jax.config import CSA, WINDOW_ONLY, ModelConfig

from . import compressor, hyper, indexer, low, rotary


def attention(
    cfg: ModelConfig, weights: dict, name: str, compress_ratio: int, x_SD: np.ndarray
) -> np.ndarray:
    """The attention sublayer on one document at positions 0..S-1, [S, D].

    `name` is for example "layers.3.attn".
    """
    positions, freqs = np.arange(len(x_SD)), rotary.frequencies(cfg, compress_ratio)
    qr_SQ, q_SNH, kv_SH, entries_CH = projections(cfg, weights, name, compress_ratio, x_SD)
    seen = seen_entries(cfg, weights, name, compress_ratio, x_SD, qr_SQ)

    o_SNH = np.empty_like(q_SNH)
    for t in positions:
        window_TH = kv_SH[
            max(0, t - cfg.sliding_window + 1) : t + 1
        ]  # the token itself is one of the window's
        keys_TH = np.concatenate([window_TH, entries_CH[seen[t]]])
        o_SNH[t] = attend(q_SNH[t], keys_TH, weights[f"{name}.attn_sink"])
    # Keys are values, so values are rotated by their own position. Rotating the output back by the
    # query's position leaves a function of the distance (trap 8).
    o_SNH = rotary.rotate(o_SNH, positions, freqs, inverse=True)
    return grouped_output(cfg, weights, name, o_SNH)


def projections(cfg, weights, name, compress_ratio, x_SD) -> tuple[np.ndarray, ...]:
    """Query latent [S, Q], queries [S, N, H], window keys [S, H] and entries [C, H].

    All are normalised and rotated.
    """
    positions = np.arange(len(x_SD))
    freqs = rotary.frequencies(cfg, compress_ratio)
    qr_SQ = hyper.rms_norm(
        low.linear(weights, f"{name}.wq_a", x_SD),
        cfg.rms_norm_eps,
        weights[f"{name}.q_norm.weight"],
    )
    q_SNH = low.linear(weights, f"{name}.wq_b", qr_SQ).reshape(
        len(x_SD), cfg.num_attention_heads, cfg.head_dim
    )
    q_SNH = rotary.rotate(
        hyper.rms_norm(q_SNH, cfg.rms_norm_eps), positions, freqs
    )  # this norm has no weight
    kv_SH = hyper.rms_norm(
        low.linear(weights, f"{name}.wkv", x_SD),
        cfg.rms_norm_eps,
        weights[f"{name}.kv_norm.weight"],
    )
    kv_SH = low.keys(cfg, weights, rotary.rotate(kv_SH, positions, freqs))
    entries_CH = np.zeros((0, cfg.head_dim))
    if compress_ratio != WINDOW_ONLY:
        entries_CH = low.keys(
            cfg,
            weights,
            compressor.entries(cfg, weights, f"{name}.compressor", compress_ratio, x_SD),
        )
    return qr_SQ, q_SNH, kv_SH, entries_CH


def seen_entries(cfg, weights, name, compress_ratio, x_SD, qr_SQ) -> list[np.ndarray]:
    """For each query the indices of the entries it attends to.

    They are none (SWA), the indexer's (CSA), or all visible ones (HCA).
    """
    if compress_ratio == WINDOW_ONLY:
        return [np.arange(0)] * len(x_SD)
    if compress_ratio == CSA:
        return indexer.selected(cfg, indexer.scores(cfg, weights, f"{name}.indexer", x_SD, qr_SQ))
    return [np.arange(compressor.visible(t, compress_ratio)) for t in range(len(x_SD))]


def attend(q_NH: np.ndarray, keys_TH: np.ndarray, sink_N: np.ndarray) -> np.ndarray:
    """sum_j p_j kv_j, [N, H], with p = exp(q.kv_j * H^-0.5) / (exp(sink) + sum_j exp(...)).

    The sink has no value.
    """
    logits_NT = q_NH @ keys_TH.T * keys_TH.shape[1] ** -0.5
    top_N = np.maximum(logits_NT.max(axis=1), sink_N)
    mass_NT = np.exp(logits_NT - top_N[:, None])
    return mass_NT @ keys_TH / (np.exp(sink_N - top_N) + mass_NT.sum(axis=1))[:, None]


def grouped_output(cfg: ModelConfig, weights: dict, name: str, o_SNH: np.ndarray) -> np.ndarray:
    """The output [S, D]: groups of N/G neighbouring heads by O rows of wo_a each, then wo_b for
    all.
    """
    heads, rank = cfg.num_attention_heads // cfg.o_groups, cfg.o_lora_rank
    wo_a = weights[f"{name}.wo_a.weight"]  # [G*O, (N/G)*H], group-major
    parts = []
    for g in range(cfg.o_groups):
        group = o_SNH[:, g * heads : (g + 1) * heads].reshape(len(o_SNH), -1)
        parts.append(group @ wo_a[g * rank : (g + 1) * rank].T)
    return low.linear(weights, f"{name}.wo_b", np.concatenate(parts, axis=1))


def index_loss(
    cfg: ModelConfig, weights: dict, name: str, x_SD: np.ndarray, dense: bool
) -> np.ndarray:
    """KL of the indexer and of choosing blindly, [queries that see an entry, 2].

    The equation: docs/equations.md#indexer-loss. C = all visible entries (dense) or the chosen
    ones. Z_h = exp(a_h) + sum of exp over the window + sum of exp over C; P[j] = sum_h exp(c[h, j])
    / Z_h, divided by its sum; KL( P || softmax over C of I ).
    """
    qr_SQ, q_SNH, kv_SH, entries_CH = projections(cfg, weights, name, CSA, x_SD)
    scores_SC = indexer.scores(cfg, weights, f"{name}.indexer", x_SD, qr_SQ)
    chosen = indexer.selected(cfg, scores_SC)
    result = []
    for t in range(len(x_SD)):
        c = np.arange(compressor.visible(t, CSA)) if dense else chosen[t]
        if len(c) == 0:
            continue
        window_TH = kv_SH[max(0, t - cfg.sliding_window + 1) : t + 1]
        near = np.exp(q_SNH[t] @ window_TH.T * cfg.head_dim**-0.5).sum(axis=1)
        far_NC = np.exp(q_SNH[t] @ entries_CH[c].T * cfg.head_dim**-0.5)
        z_N = np.exp(weights[f"{name}.attn_sink"]) + near + far_NC.sum(axis=1)
        p_C = (far_NC / z_N[:, None]).sum(axis=0)
        p_C /= p_C.sum()
        log_q_C = scores_SC[t, c] - np.log(np.exp(scores_SC[t, c]).sum())
        result.append((p_C @ (np.log(p_C) - log_q_C), p_C @ np.log(p_C * len(c))))
    return np.array(result).reshape(-1, 2)
