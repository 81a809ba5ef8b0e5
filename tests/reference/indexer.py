"""The lightning indexer, restated: which compressed entries a query of a CSA layer attends to.

Plain NumPy from docs/equations.md#indexer and traps 19 to 21, on one document. The Hadamard
rotation, which changes no score, belongs to low precision (low.py). All arithmetic is float64.
Legend: S tokens, C entries, D hidden, Q query rank, I index heads, J index dim.
Next file to read: attention.py.
"""

import numpy as np

from v4jax.config import CSA, ModelConfig

from . import compressor, low, rotary


def scores(
    cfg: ModelConfig, weights: dict, name: str, x_SD: np.ndarray, qr_SQ: np.ndarray
) -> np.ndarray:
    """I[t, s] = sum_h w[t, h] relu(q[t, h] . K[s]), [S, C], before any mask.

    `name` is for example "layers.3.attn.indexer". `qr_SQ` is the query latent after its norm, the
    one that attention itself uses (trap 21).
    """
    heads, dim = cfg.index_n_heads, cfg.index_head_dim
    keys_CJ = low.index(weights, compressor.entries(cfg, weights, f"{name}.compressor", CSA, x_SD))
    queries_SIJ = low.linear(weights, f"{name}.wq_b", qr_SQ).reshape(-1, heads, dim)
    queries_SIJ = rotary.rotate(queries_SIJ, np.arange(len(x_SD)), rotary.frequencies(cfg, CSA))
    queries_SIJ = low.index(weights, queries_SIJ)
    shares_SI = (x_SD @ weights[f"{name}.weights_proj.weight"].T) * dim**-0.5 * heads**-0.5
    result = np.zeros((len(x_SD), len(keys_CJ)))
    for h in range(heads):
        result += shares_SI[:, h, None] * np.maximum(queries_SIJ[:, h] @ keys_CJ.T, 0)
    return result


def top_k(scores_C: np.ndarray, k: int) -> np.ndarray:
    """The indices of the k largest scores (all, if fewer), ascending.

    Among equals the smallest index wins.
    """
    return np.sort(np.argsort(-scores_C, kind="stable")[:k])


def selected(cfg: ModelConfig, scores_SC: np.ndarray) -> list[np.ndarray]:
    """For each query the set of its at most index_topk entries, among the visible ones only."""
    return [
        top_k(scores_C[: compressor.visible(t, CSA)], cfg.index_topk)
        for t, scores_C in enumerate(scores_SC)
    ]
