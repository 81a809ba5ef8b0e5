"""The two optimisers, restated: Muon (Algorithm 1) for one 2-D matrix, AdamW for the rest.

Plain NumPy from docs/equations.md#muon and trap 44. All arithmetic is float64.
"""

import numpy as np

_FAST = (3.4445, -4.7750, 2.0315)  # 8 steps: all singular values quickly near 1
_EXACT = (2.0, -1.5, 0.5)  # 2 steps: settle at 1


def hybrid_newton_schulz(g: np.ndarray) -> np.ndarray:
    """g over its Frobenius norm, then 8 + 2 steps of x <- a x + b (x x^T) x + c (x x^T)^2 x.

    0 stays 0.
    """
    norm = np.sqrt((np.asarray(g, np.float64) ** 2).sum())
    if norm == 0:
        return np.zeros_like(g, np.float64)
    x = g / norm
    for a, b, c in [_FAST] * 8 + [_EXACT] * 2:
        square = x @ x.T
        x = a * x + b * square @ x + c * square @ square @ x
    return x


def muon(
    w, m, g, lr: float, mu: float = 0.95, weight_decay: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    """One Muon step for the matrix w with momentum m and gradient g, all of one 2-D shape.

    Returns the new (w, m). M = mu*M + G; O = HNS(mu*M + G) * sqrt(max(rows, cols)) * 0.18; W = W*(1
    - lr*wd) - lr*O. The momentum starts at 0 and is no average: no (1 - mu), no bias correction.
    """
    m = mu * np.asarray(m, np.float64) + g
    o = hybrid_newton_schulz(mu * m + g) * np.sqrt(max(w.shape)) * 0.18
    return w * (1 - lr * weight_decay) - lr * o, m


def adamw(w, m, v, g, step: int, lr: float, b1=0.9, b2=0.95, eps=1e-20, weight_decay=0.1):
    """One AdamW step with decoupled decay; step counts from 1; returns the new (w, m, v).

    m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; W = W*(1 - lr*wd) - lr * (m/(1-b1^step)) /
    (sqrt(v/(1-b2^step)) + eps).
    """
    g = np.asarray(g, np.float64)
    m = b1 * np.asarray(m, np.float64) + (1 - b1) * g
    v = b2 * np.asarray(v, np.float64) + (1 - b2) * g**2
    update = (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + eps)
    return w * (1 - lr * weight_decay) - lr * update, m, v


def optimizer_of(name: str) -> str:
    """ "muon", "adamw" or "none" for an official tensor name.

    Muon for every matrix except embedding and head; AdamW for these, mHC base and scale, norm
    weights, sinks and ape. mHC fn, the gates and the MTP projections are matrices. The two routing
    tensors belong to no optimiser.
    """
    if name.endswith(("gate.bias", "tid2eid")):
        return "none"
    if name in ("embed.weight", "head.weight") or name.endswith(
        ("_base", "_scale", "norm.weight", "attn_sink", "ape")
    ):
        return "adamw"
    return "muon"
