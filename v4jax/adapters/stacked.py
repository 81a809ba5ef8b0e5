"""Pairs of routed experts, as PEFT lays them out for a stacked parameter, and back.

PEFT has one matrix of each kind for all experts: A [E*r, I], expert after expert, and B [O, r*E],
whose columns are rank-major. w1 and w3 are one parameter there, [E, 2F, D]: their pairs become one
of twice the rank, with B block-diagonal.

Shapes: E experts, I and O input and output width, R rank, D hidden, F expert hidden.
Next file to read: v4jax/adapters/files.py.
"""

import numpy as np

Pair = tuple[np.ndarray, np.ndarray]
"""a [E,I,R] and b [E,R,O]."""


def to_peft(pair: Pair) -> Pair:
    """(A, B) of a stacked parameter."""
    a_EIR, b_ERO = pair
    rank_major_ORE = b_ERO.transpose(2, 1, 0)
    return (
        a_EIR.transpose(0, 2, 1).reshape(-1, a_EIR.shape[1]),
        rank_major_ORE.reshape(rank_major_ORE.shape[0], -1),
    )


def from_peft(experts: int, pair: Pair) -> Pair:
    """The inverse of `to_peft`."""
    first, second = pair
    a_ERI = first.reshape(experts, -1, first.shape[1])
    b_ORE = second.reshape(second.shape[0], -1, experts)
    return a_ERI.transpose(0, 2, 1), b_ORE.transpose(2, 1, 0)


def join(w1: Pair | None, w3: Pair | None) -> Pair:
    """One pair of the joined matrix [w1 | w3]; a matrix without a pair adds nothing."""
    known = [pair for pair in (w1, w3) if pair is not None]
    parts = []
    for n, pair in enumerate((w1, w3)):
        if pair is not None:
            zeros = np.zeros_like(pair[1])
            parts.append(np.concatenate((zeros, pair[1]) if n else (pair[1], zeros), axis=2))
    return np.concatenate([a for a, _ in known], axis=2), np.concatenate(parts, axis=1)


def part(pair: Pair) -> tuple[Pair | None, Pair | None]:
    """The pairs of w1 and w3; as `join` made them, where half of B is zeros, else of full rank."""
    a_EDR, b_ERO = pair
    width, half = b_ERO.shape[2] // 2, b_ERO.shape[1] // 2
    upper, lower = b_ERO[:, :, :width], b_ERO[:, :, width:]
    if not lower.any():
        return (a_EDR, upper), None
    if not upper.any():
        return None, (a_EDR, lower)
    if not upper[:, half:].any() and not lower[:, : b_ERO.shape[1] - half].any():
        return (a_EDR[:, :, :half], upper[:, :half]), (a_EDR[:, :, half:], lower[:, half:])
    return (a_EDR, upper), (a_EDR, lower)
