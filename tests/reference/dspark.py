"""The DSpark drafter, restated: the taps of the trunk, the context of the stages, one draft.

Plain NumPy from docs/equations.md#dspark, on one document. Nothing is kept between drafts: the
trunk runs anew on all committed tokens. All arithmetic is float64.

Legend: P position of the newest token, which the trunk has not run; S positions before it; G tokens
of a block, X streams, D hidden, N heads, H head dim, T tapped layers, R Markov rank, V vocabulary.
Next file to read: transformer.py.
"""

from typing import NamedTuple

import numpy as np

from v4jax.config import WINDOW_ONLY, ModelConfig
from v4jax.config.releases import DSparkConfig

from . import attention, hyper, low, moe, rotary, transformer


class Draft(NamedTuple):
    """What a draft round gives for its G slots; slot i drafts the token of position P+1+i."""

    tokens_G: np.ndarray
    logits_GV: np.ndarray  # L, with the Markov head
    plain_GV: np.ndarray  # U, without it
    confidence_G: np.ndarray  # z, before the sigmoid


def draft(cfg: ModelConfig, dspark: DSparkConfig, weights: dict, tokens) -> Draft:
    """The likeliest tokens after `tokens`, of which the last is the newest: it is at position P.

    Its output needs no run of the trunk on that token.
    """
    tokens = np.asarray(tokens)
    weights = type(weights)(
        (name, np.asarray(w, np.int64 if name.endswith("tid2eid") else np.float64))
        for name, w in weights.items()
    )
    newest = len(tokens) - 1
    m_SD = context(cfg, dspark, weights, tokens[:newest])
    ids_G = np.full(dspark.block_size, dspark.noise_token_id)
    ids_G[0] = tokens[newest]
    streams_GXD = np.repeat(weights["embed.weight"][ids_G][:, None], cfg.hc_mult, axis=1)
    for stage in range(dspark.stages):
        streams_GXD = _stage(cfg, weights, f"mtp.{stage}", streams_GXD, ids_G, m_SD)
    last = f"mtp.{dspark.stages - 1}"
    h_GD = hyper.head(cfg, weights, f"{last}.", streams_GXD)
    normed_GD = hyper.rms_norm(h_GD, cfg.rms_norm_eps, weights[f"{last}.norm.weight"])
    plain_GV = normed_GD @ weights["head.weight"].T
    return _choose(dspark, weights, tokens[newest], h_GD, plain_GV)


def context(cfg: ModelConfig, dspark: DSparkConfig, weights: dict, tokens_S) -> np.ndarray:
    """m[p] of every position, [S, D]: the trunk's tapped layers, projected and normalised.

    A tap is the mean of the streams after the layer, before any norm.
    """
    if len(tokens_S) == 0:
        return np.zeros((0, cfg.hidden_size))
    streams_SXD = np.repeat(weights["embed.weight"][tokens_S][:, None], cfg.hc_mult, axis=1)
    taps = {}
    for number in range(cfg.num_hidden_layers):
        ratio = cfg.compress_ratios[number]
        streams_SXD, _ = transformer.block(
            cfg, weights, f"layers.{number}", ratio, streams_SXD, tokens_S
        )
        taps[number] = streams_SXD.mean(axis=1)
    joined = np.concatenate([taps[number] for number in dspark.target_layer_ids], axis=1)
    m_SD = low.linear(weights, "mtp.0.main_proj", joined)
    return hyper.rms_norm(m_SD, cfg.rms_norm_eps, weights["mtp.0.main_norm.weight"])


def _choose(dspark: DSparkConfig, weights: dict, newest: int, h_GD, plain_GV) -> Draft:
    """Slot by slot: the Markov head adds what the token before says."""
    last, before = f"mtp.{dspark.stages - 1}", newest
    w1_VR = weights[f"{last}.markov_head.markov_w1.weight"]
    w2_VR = weights[f"{last}.markov_head.markov_w2.weight"]
    proj = weights[f"{last}.confidence_head.proj.weight"][0]
    chosen, logits, confidences = [], [], []
    for h_D, plain_V in zip(h_GD, plain_GV, strict=True):
        e_R = w1_VR[before]
        logits.append(plain_V + w2_VR @ e_R)
        confidences.append(proj @ np.concatenate([h_D, e_R]))
        before = int(logits[-1].argmax())
        chosen.append(before)
    return Draft(np.array(chosen), np.array(logits), plain_GV, np.array(confidences))


def _stage(cfg, weights, name, streams_GXD, ids_G, m_SD) -> np.ndarray:
    """One stage: a block of the trunk, but for what its attention sees."""
    mix = hyper.mix(cfg, weights, f"{name}.hc_attn", streams_GXD)
    x_GD = hyper.collapse(mix.pre_SX, streams_GXD)
    x_GD = hyper.rms_norm(x_GD, cfg.rms_norm_eps, weights[f"{name}.attn_norm.weight"])
    x_GD = _attention(cfg, weights, f"{name}.attn", x_GD, m_SD)
    streams_GXD = hyper.expand(mix, x_GD, streams_GXD)
    mix = hyper.mix(cfg, weights, f"{name}.hc_ffn", streams_GXD)
    x_GD = hyper.collapse(mix.pre_SX, streams_GXD)
    x_GD = hyper.rms_norm(x_GD, cfg.rms_norm_eps, weights[f"{name}.ffn_norm.weight"])
    x_GD, _ = moe.moe(cfg, weights, f"{name}.ffn", x_GD, ids_G)
    return hyper.expand(mix, x_GD, streams_GXD)


def _attention(cfg, weights, name, x_GD, m_SD) -> np.ndarray:
    """Every query sees the W positions before P, and the whole block: no causal mask in it."""
    newest = len(m_SD)
    freqs = rotary.frequencies(cfg, WINDOW_ONLY)
    positions = newest + np.arange(len(x_GD))
    qr_GQ = hyper.rms_norm(
        low.linear(weights, f"{name}.wq_a", x_GD),
        cfg.rms_norm_eps,
        weights[f"{name}.q_norm.weight"],
    )
    shape = (len(x_GD), cfg.num_attention_heads, cfg.head_dim)
    q_GNH = hyper.rms_norm(
        low.linear(weights, f"{name}.wq_b", qr_GQ).reshape(shape), cfg.rms_norm_eps
    )
    q_GNH = rotary.rotate(q_GNH, positions, freqs)
    first = max(0, newest - cfg.sliding_window)
    keys_TH = np.concatenate(
        [
            _keys(cfg, weights, name, m_SD[first:], np.arange(first, newest)),
            _keys(cfg, weights, name, x_GD, positions),
        ]
    )
    sink_N = weights[f"{name}.attn_sink"]
    o_GNH = np.array([attention.attend(q_NH, keys_TH, sink_N) for q_NH in q_GNH])
    o_GNH = rotary.rotate(o_GNH, positions, freqs, inverse=True)
    return attention.grouped_output(cfg, weights, name, o_GNH)


def _keys(cfg, weights, name, x_SD, positions) -> np.ndarray:
    """Keys, which are values too, [S, H]; of the context from m, without the stage's attn_norm."""
    kv_SH = low.linear(weights, f"{name}.wkv", x_SD)
    kv_SH = hyper.rms_norm(kv_SH, cfg.rms_norm_eps, weights[f"{name}.kv_norm.weight"])
    kv_SH = rotary.rotate(kv_SH, positions, rotary.frequencies(cfg, WINDOW_ONLY))
    return low.keys(cfg, weights, kv_SH)
