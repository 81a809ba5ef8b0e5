"""Compressed entries, restated.

HCA pools 128 tokens into one entry; CSA pools 8, 4 of the window before and 4 of its own. Plain
NumPy from docs/equations.md#compressor and traps 7 and 15 to 18, on one document. All arithmetic is
float64.

Legend: S tokens of the document, C entries, D hidden, H width of an entry, M compress ratio.
Next file to read: indexer.py.
"""

import numpy as np

from v4jax.config import CSA, ModelConfig

from . import hyper, rotary


def pool(gates: np.ndarray, values: np.ndarray) -> np.ndarray:
    """sum_j S_j * C_j, [rows, H] -> [H]; S is the softmax over the rows, by channel (trap 17)."""
    shares = np.exp(gates - gates.max(axis=0))
    return (shares / shares.sum(axis=0) * values).sum(axis=0)


def visible(t: int, compress_ratio: int) -> int:
    """How many entries query t may see: entry w iff w < (t+1)//m (trap 11).

    Example, m=4: t=2 sees 0, t=3 and t=6 see 1.
    """
    return (t + 1) // compress_ratio


def entry_positions(tokens: int, compress_ratio: int) -> np.ndarray:
    """Rotary position m*w of each entry w, int [C]: its window's first token.

    An incomplete last window has no entry.
    """
    return np.arange(tokens // compress_ratio) * compress_ratio


def entries(
    cfg: ModelConfig, weights: dict, name: str, compress_ratio: int, x_SD: np.ndarray
) -> np.ndarray:
    """The entries of one document, rotated, [C, H].

    `name` is for example "layers.3.attn.compressor".
    """
    kv = x_SD @ weights[f"{name}.wkv.weight"].T
    gate = x_SD @ weights[f"{name}.wgate.weight"].T
    together = _pool_overlapping if compress_ratio == CSA else _pool_apart
    pooled = together(kv, gate, weights[f"{name}.ape"])
    normed = hyper.rms_norm(pooled, cfg.rms_norm_eps, weights[f"{name}.norm.weight"])
    positions = entry_positions(len(x_SD), compress_ratio)
    return rotary.rotate(normed, positions, rotary.frequencies(cfg, compress_ratio))


def _pool_apart(kv: np.ndarray, gate: np.ndarray, ape: np.ndarray) -> np.ndarray:
    """HCA: window w is rows 128w .. 128w+127, all [S, H]; `ape` [128, H] is added to the gates.

    Another ratio than 128 is the same with windows of that many rows.
    """
    m = len(ape)
    pooled = np.zeros((len(kv) // m, kv.shape[1]))
    for w in range(len(pooled)):
        rows = slice(w * m, (w + 1) * m)
        pooled[w] = pool(gate[rows] + ape, kv[rows])
    return pooled


def _pool_overlapping(kv: np.ndarray, gate: np.ndarray, ape: np.ndarray) -> np.ndarray:
    """CSA: kv, gate [S, 2H], `ape` [4, 2H].

    Half a (the first H channels) serves the NEXT window, half b its own. Entry 2 pools rows 4..7
    with their a half and rows 8..11 with their b half, one softmax over the 8 rows. Entry 0 has no
    predecessor (official: C = 0, Z = -inf, so weight 0) and pools its own 4 rows alone.
    """
    m, width = len(ape), kv.shape[1] // 2
    pooled = np.zeros((len(kv) // m, width))
    for w in range(len(pooled)):
        own, before = slice(w * m, (w + 1) * m), slice((w - 1) * m, w * m)
        gates, values = (gate[own] + ape)[:, width:], kv[own, width:]
        if w > 0:
            gates = np.concatenate([(gate[before] + ape)[:, :width], gates])
            values = np.concatenate([kv[before, :width], values])
        pooled[w] = pool(gates, values)
    return pooled
