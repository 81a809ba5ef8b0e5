"""Mixture of experts, restated, token by token.

Hash and score routing, clamped experts, balance loss, load counts. Plain NumPy from
docs/equations.md#moe, docs/equations.md#losses and traps 23 to 30. All arithmetic is float64.

Legend: S tokens, D hidden, E experts, K active experts.
Next file to read: loss.py.
"""

from typing import NamedTuple

import numpy as np

from v4jax.config import ModelConfig

from . import hyper, low


class Routing(NamedTuple):
    """One layer's routing: unbiased scores, float64 [S, E]; the chosen experts, int64 [S, K]."""

    scores_SE: np.ndarray
    chosen_SK: np.ndarray


def moe(
    cfg: ModelConfig, weights: dict, name: str, x_SD: np.ndarray, tokens_S: np.ndarray
) -> tuple[np.ndarray, Routing]:
    """sum_i w_i expert_i(x) + shared(x), [S, D], and the routing.

    `name` is for example "layers.3.ffn". w = s[chosen] / sum(s[chosen]) * routed_scaling_factor,
    from scores without bias, for hash layers too (trap 23).
    """
    routing = route(cfg, weights, name, x_SD, tokens_S)
    result = expert(cfg, weights, f"{name}.shared_experts", x_SD)
    for t, (scores_E, chosen_K) in enumerate(zip(*routing, strict=True)):
        total = scores_E[chosen_K].sum()
        for e in chosen_K:
            share = scores_E[e] / total * cfg.routed_scaling_factor
            result[t] += expert(cfg, weights, f"{name}.experts.{e}", x_SD[t : t + 1], share)[0]
    return result, routing


def route(
    cfg: ModelConfig, weights: dict, name: str, x_SD: np.ndarray, tokens_S: np.ndarray
) -> Routing:
    """s = sqrt(softplus(x @ gate.T)), and the chosen experts.

    They are those of the token's row of the table, or the top k of s + bias.
    """
    scores_SE = np.sqrt(np.logaddexp(0, x_SD @ weights[f"{name}.gate.weight"].T))
    if f"{name}.gate.tid2eid" in weights:
        return Routing(scores_SE, weights[f"{name}.gate.tid2eid"][tokens_S].astype(np.int64))
    biased = scores_SE + weights[f"{name}.gate.bias"]
    return Routing(
        scores_SE, np.argsort(-biased, axis=1, kind="stable")[:, : cfg.num_experts_per_tok]
    )


def expert(
    cfg: ModelConfig, weights: dict, name: str, x: np.ndarray, share: float = 1.0
) -> np.ndarray:
    """w2(share * silu(min(w1 x, limit)) * clip(w3 x, -limit, limit)).

    The clamp comes before silu (trap 29), the share before w2 (trap 30).
    """
    gate = np.minimum(low.linear(weights, f"{name}.w1", x), cfg.swiglu_limit)
    up = np.clip(low.linear(weights, f"{name}.w3", x), -cfg.swiglu_limit, cfg.swiglu_limit)
    return low.linear(weights, f"{name}.w2", share * gate * hyper.sigmoid(gate) * up)


def load(routing: Routing, counted_S: np.ndarray) -> np.ndarray:
    """How many of the counted tokens chose each expert, int64 [E].

    `counted_S` is a boolean mask.
    """
    experts = routing.scores_SE.shape[1]
    return np.bincount(routing.chosen_SK[counted_S].reshape(-1), minlength=experts)


def balance(routing: Routing, counted_S: np.ndarray) -> float:
    """The balance loss of one sequence: sum_i f_i P_i, over its T counted tokens; 0 if it has none.

    f_i = E / (K T) * (tokens choosing i), P_i = mean_t s[t, i] / sum_j s[t, j]. Even use gives 1.
    """
    if not counted_S.any():
        return 0.0
    scores = routing.scores_SE[counted_S]
    (tokens, experts), active = scores.shape, routing.chosen_SK.shape[1]
    f_E = load(routing, counted_S) * experts / (active * tokens)
    return float(f_E @ (scores / scores.sum(axis=1, keepdims=True)).mean(axis=0))
