"""Compiled for GPUs that are not there (extra `gpu`): experts' tokens travel by a ragged all-to-all, and only as needed."""

import dataclasses
import importlib.util

import pytest
from test_mesh import CFG

from v4jax.layout import report_layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra `gpu`: pip install -e '.[gpu]'"),
]


def test_a_step_compiles_for_two_hosts_of_h100():
    model = CFG.model.replace(num_hidden_layers=1, compress_ratios=(4, 0), num_hash_layers=0, hidden_size=256)
    cfg = dataclasses.replace(CFG, model=model, batch_size=16, mesh="fsdp=2,expert=4,tensor=2", layout="pod", dtype="bfloat16")
    report = report_layout(cfg, "h100:16")
    sent = {(axes, kind): size for axes, kind, _, size in report.collectives}
    for key in (("expert", "ragged-all-to-all"), ("fsdp", "all-gather"), ("tensor", "all-reduce")):
        assert sent[key] > 0, sent
    sent_bytes, least = report.expert_bytes
    assert least <= sent_bytes <= 1.25 * least


@pytest.mark.parametrize("target, line", [("h100:12", "must be h100:N with N up to 8, or a multiple of 8"), ("h100:8", "mesh has 4 devices")])
def test_bad_targets(target, line):
    with pytest.raises(ValueError, match=line):
        report_layout(dataclasses.replace(CFG, mesh="expert=4"), target)
