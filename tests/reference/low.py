"""Low precision, restated: which numbers the served model rounds, and to what.

The specification is docs/equations.md#low-precision. `served(weights)` rounds the matrices as files
store them and marks the dictionary. The modules here then round what enters such a matrix,
keys/values, and the indexer's queries and keys. Unmarked weights compute in full precision. Plain
NumPy: the nearest number is looked up in a list of all of them. All arithmetic is float64.

Legend: O output features, I input features, H head dim.
Next file to read: attention.py.
"""

import re

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array(
    [m / 8 * 2.0**-6 for m in range(8)]
    + [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)]
)[:-1]
_PARTS = r"(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)"
_MATRIX = rf"attn\.{_PARTS}|shared_experts\.w[123]|mtp\.0\.([eh]|main)_proj"


class Served(dict):
    """Weights by official name, already rounded."""


def served(weights: dict) -> Served:
    """fp8 in 128 x 128 for most matrices, MXFP4 in 1 x 32 for routed experts, the rest as it is."""
    return Served({name: _stored(name, w) for name, w in weights.items()})


def _stored(name, w):
    if re.search(r"\.experts\.\d+\.w[123]\.weight$", name):
        return rounded(w, 1, 32, E2M1, 6 * 2.0**-126)
    return rounded(w, 128, 128, E4M3, 1e-4) if re.search(rf"({_MATRIX})\.weight$", name) else w


def linear(weights: dict, name: str, x: np.ndarray) -> np.ndarray:
    """x @ W.T; a served model rounds x to fp8 in blocks of 128."""
    return (rounded(x, 1, 128, E4M3, 1e-4) if isinstance(weights, Served) else x) @ weights[
        f"{name}.weight"
    ].T


def keys(cfg, weights: dict, kv: np.ndarray) -> np.ndarray:
    """Rotated keys/values [., H] in fp8, blocks of 64; the rope dims stay as they are."""
    if not isinstance(weights, Served):
        return kv
    plain = cfg.head_dim - cfg.qk_rope_head_dim
    return np.concatenate([rounded(kv[:, :plain], 1, 64, E4M3, 1e-4), kv[:, plain:]], axis=1)


def index(weights: dict, x: np.ndarray) -> np.ndarray:
    """The indexer's queries or keys [., J]: Hadamard rotation over sqrt(J), MXFP4 in 1 x 32."""
    if not isinstance(weights, Served):
        return x
    dim = x.shape[-1]
    signs = np.array([[(-1) ** bin(i & j).count("1") for j in range(dim)] for i in range(dim)])
    turned = (x @ signs / np.sqrt(dim)).reshape(-1, dim)
    return rounded(turned, 1, 32, E2M1, 6 * 2.0**-126).reshape(x.shape)


def rounded(x: np.ndarray, rows: int, columns: int, values: np.ndarray, least: float) -> np.ndarray:
    """Rounds each block of rows x columns to the nearest of `values` times its scale.

    The scale is 2^ceil(log2(max |x| / largest)); ties go to even.
    """
    result = np.empty(x.shape)
    middles = (values[1:] + values[:-1]) / 2
    for r, c in np.ndindex(-(-x.shape[0] // rows), -(-x.shape[1] // columns)):
        where = np.s_[r * rows : (r + 1) * rows, c * columns : (c + 1) * columns]
        ratio = np.float32(max(np.abs(x[where]).max(), least)) * np.float32(1 / values[-1])
        fraction, exponent = np.frexp(float(ratio))
        scale = 2.0 ** (exponent - 1 if fraction == 0.5 else exponent)
        size = np.abs(x[where]) / scale
        code = np.searchsorted(middles, size)
        tie = (
            (code < len(middles))
            & (size == middles[np.minimum(code, len(middles) - 1)])
            & (code % 2 == 1)
        )
        result[where] = np.copysign(values[code + tie], x[where]) * scale
    return result
