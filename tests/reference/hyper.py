"""Manifold-constrained hyper-connections (mHC), restated.

They collapse the streams, expand and mix them, and collapse them at the end. Plain NumPy from
docs/equations.md#mhc and traps 1 to 3. All arithmetic is float64.

Legend: S positions, X streams, D hidden.
Next file to read: rotary.py.
"""

from typing import NamedTuple

import numpy as np

from v4jax.config import ModelConfig


class Mix(NamedTuple):
    """One site's weights for each token: pre collapses, post expands, comb mixes.

    comb[j, k] carries stream j to k.
    """

    pre_SX: np.ndarray
    post_SX: np.ndarray
    comb_SXX: np.ndarray


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), written so that no exponential overflows."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def rms_norm(x: np.ndarray, eps: float, weight: np.ndarray | float = 1.0) -> np.ndarray:
    """weight * x / sqrt(mean of x^2 over the last axis + eps)."""
    return weight * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


def project(cfg: ModelConfig, fn: np.ndarray, streams_SXD: np.ndarray) -> np.ndarray:
    """mix = (vec(X) @ fn.T) * rsqrt(mean(vec(X)^2) + rms_eps), [S, rows of fn]."""
    x = streams_SXD.reshape(len(streams_SXD), -1)
    return (x @ fn.T) / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + cfg.rms_norm_eps)


def sinkhorn(cfg: ModelConfig, logits_SXX: np.ndarray) -> np.ndarray:
    """Nearly doubly stochastic matrices.

    They are the softmax of rows + eps, columns, then (iterations - 1) x (rows, columns). Rows sum
    over the last axis, columns over the one before; hc_eps is in every denominator (trap 2).
    """
    comb = np.exp(logits_SXX - logits_SXX.max(axis=-1, keepdims=True))
    comb = comb / comb.sum(axis=-1, keepdims=True) + cfg.hc_eps
    comb = comb / (comb.sum(axis=-2, keepdims=True) + cfg.hc_eps)
    for _ in range(cfg.hc_sinkhorn_iters - 1):
        comb = comb / (comb.sum(axis=-1, keepdims=True) + cfg.hc_eps)
        comb = comb / (comb.sum(axis=-2, keepdims=True) + cfg.hc_eps)
    return comb


def mix(cfg: ModelConfig, weights: dict, site: str, streams_SXD: np.ndarray) -> Mix:
    """The three kinds of weights of one site; `site` is for example "layers.3.hc_attn"."""
    n = cfg.hc_mult
    fn, base, scale = (weights[f"{site}_{part}"] for part in ("fn", "base", "scale"))
    m = project(cfg, fn, streams_SXD)
    pre = sigmoid(m[:, :n] * scale[0] + base[:n]) + cfg.hc_eps
    post = 2 * sigmoid(m[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = m[:, 2 * n :].reshape(-1, n, n) * scale[2] + base[2 * n :].reshape(n, n)
    return Mix(pre, post, sinkhorn(cfg, comb))


def collapse(pre_SX: np.ndarray, streams_SXD: np.ndarray) -> np.ndarray:
    """u = sum_j pre[j] X[j], [S, D]: the sublayer's input before its RMSNorm."""
    return sum(pre_SX[:, j, None] * streams_SXD[:, j] for j in range(streams_SXD.shape[1]))


def expand(weights: Mix, output_SD: np.ndarray, streams_SXD: np.ndarray) -> np.ndarray:
    """X'[k] = post[k] * output + sum_j comb[j, k] X[j]: comb is consumed transposed (trap 1)."""
    result = np.empty_like(streams_SXD)
    for k in range(streams_SXD.shape[1]):
        result[:, k] = weights.post_SX[:, k, None] * output_SD
        for j in range(streams_SXD.shape[1]):
            result[:, k] += weights.comb_SXX[:, j, k, None] * streams_SXD[:, j]
    return result


def head(cfg: ModelConfig, weights: dict, prefix: str, streams_SXD: np.ndarray) -> np.ndarray:
    """The last collapse, [S, D], with weights sigmoid(mix * scale + base) + hc_eps.

    `prefix` is "" or "mtp.0.".
    """
    fn, base, scale = (weights[f"{prefix}hc_head_{part}"] for part in ("fn", "base", "scale"))
    return collapse(
        sigmoid(project(cfg, fn, streams_SXD) * scale[0] + base) + cfg.hc_eps, streams_SXD
    )
