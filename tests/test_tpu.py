"""Compiled for TPU chips that are not there (extra `tpu`): the ragged all-to-all is one, and XLA warns of nothing."""

import dataclasses
import importlib.util

import pytest
from test_mesh import CFG

from v4jax.layout import report_layout

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `tpu`: pip install -e '.[tpu]'"),
]


def test_experts_by_exchange_send_what_they_must(capfd):
    # Rows as wide as V4-Flash's: a TPU moves whole lanes, so narrow rows would weigh more than they hold.
    model = CFG.model.replace(hidden_size=4096)
    cfg = dataclasses.replace(CFG, model=model, mesh="fsdp=2,expert=2,tensor=2", layout="pod", dtype="bfloat16")
    report = report_layout(cfg, "v5p:2x2x2")
    kinds = {(axes, kind) for axes, kind, *_ in report.collectives}
    assert ("expert", "ragged-all-to-all") in kinds
    sent, least = report.expert_bytes
    assert least <= sent <= 1.25 * least
    # XLA says so on stderr when it cannot partition a lookup and copies its table to every device.
    assert "rematerialization" not in capfd.readouterr().err
