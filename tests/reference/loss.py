"""The training loss, restated: next token + 0.3 * MTP + 1e-4 * balance.

Labels stay inside their document. Plain NumPy from docs/equations.md#losses and trap 32. All
arithmetic is float64.

Legend: B rows, S positions, V vocabulary.
Next file to read: muon.py.
"""

from typing import NamedTuple

import numpy as np

from v4jax.config import ModelConfig

from .transformer import Output, documents


class Loss(NamedTuple):
    """total = next_token + mtp_weight * mtp + balance_weight * balance; parts are unweighted."""

    total: float
    next_token: float
    mtp: float
    balance: float


def loss(
    cfg: ModelConfig,
    output: Output,
    tokens_BS,
    segment_ids_BS=None,
    mtp_weight=0.3,
    balance_weight=1e-4,
) -> Loss:
    """The loss of one batch. Without segment ids each row is one document.

    The balance term is the sum over score-routed layers, MTP's included, of the mean over rows that
    hold a counted token. Hash layers choose by table, so a balance loss on their gate would move
    what chooses nothing (Megatron-LM leaves them out too). V3's report adds the term of each layer
    to the loss, hence a sum.
    """
    tokens_BS = np.asarray(tokens_BS)
    segments_BS = np.ones_like(tokens_BS) if segment_ids_BS is None else np.asarray(segment_ids_BS)
    next_token = mean_nll(output.logits, tokens_BS, segments_BS, ahead=1)
    mtp = (
        mean_nll(output.mtp_logits, tokens_BS, segments_BS, ahead=2)
        if output.mtp_logits is not None
        else 0.0
    )
    balance = 0.0
    for balance_B in output.balance[cfg.num_hash_layers :]:
        rows = balance_B > 0  # scores are positive, so 0 marks a row without counted tokens
        balance += float(balance_B[rows].mean()) if rows.any() else 0.0
    return Loss(next_token + mtp_weight * mtp + balance_weight * balance, next_token, mtp, balance)


def mean_nll(
    logits_BSV: np.ndarray, tokens_BS: np.ndarray, segments_BS: np.ndarray, ahead: int
) -> float:
    """Mean of -log p(token t+ahead | position t) over positions with a label in the same document.

    It is 0 if there are none.

    Example, ahead=2, segments 1 1 1 2 2 0 0 0: only position 0 counts. Segment 0 is padding and
    counts nowhere.
    """
    total, count = 0.0, 0
    for logits_SV, tokens_S, segments_S in zip(logits_BSV, tokens_BS, segments_BS, strict=True):
        for start, stop in documents(segments_S):
            for t in range(start, stop - ahead if segments_S[start] != 0 else start):
                total += nll(logits_SV[t], tokens_S[t + ahead])
                count += 1
    return total / count if count else 0.0


def nll(logits_V: np.ndarray, label: int) -> float:
    """log sum exp(logits) - logits[label]."""
    return float(np.logaddexp.reduce(np.asarray(logits_V, np.float64)) - logits_V[label])
