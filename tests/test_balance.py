"""The balance loss is the equation's: a sequence is a row, and in packed rows a document.

Shapes: B rows, S positions, E experts, K active experts.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from reference import moe as reference
from reference.transformer import documents
from trees import small_config

from sharding.rules import AxisRules
from v4jax.model.balance import balance_loss, expert_share
from v4jax.model.segments import read_segments

EXPERTS, ACTIVE = 6, 2
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12, [1] * 2 + [2] * 9 + [0]], np.int32)


@pytest.fixture(scope="module")
def routing():
    """Scores [B,S,E] and the experts of highest score [B,S,K]."""
    score_BSE = np.random.default_rng(0).uniform(0.1, 2, (3, 12, EXPERTS)).astype(np.float32)
    return score_BSE, np.argsort(-score_BSE, axis=-1)[..., :ACTIVE]


def balance(routing, segment_BS=None) -> float:
    score_BSE, index_BSK = map(jnp.asarray, routing)
    segment_BS = None if segment_BS is None else jnp.asarray(segment_BS)
    rows = read_segments(small_config(), index_BSK.shape[1], segment_BS)
    share_BSE = expert_share(AxisRules(), index_BSK, rows, EXPERTS)
    return float(balance_loss(score_BSE, share_BSE, rows))


def expected(routing, row: int, part: slice) -> float:
    score_SE, index_SK = (array[row, part] for array in routing)
    return reference.balance(reference.Routing(score_SE, index_SK), np.ones(len(score_SE), bool))


def test_whole_rows_count_alike(routing):
    want = np.mean([expected(routing, row, slice(None)) for row in range(3)])
    assert balance(routing) == pytest.approx(want, rel=1e-5)


def test_packed_documents_count_by_their_tokens(routing):
    total, tokens = 0.0, 0
    for row, segment_S in enumerate(SEGMENTS):
        for start, stop in documents(segment_S):
            if segment_S[start] > 0:
                total += (stop - start) * expected(routing, row, slice(start, stop))
                tokens += stop - start
    assert balance(routing, SEGMENTS) == pytest.approx(total / tokens, rel=1e-5)
