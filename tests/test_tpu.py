"""Programs compiled for TPU chips that are not there (extra `tpu`).

The ragged all-to-all is one, and XLA warns of nothing.
"""

import dataclasses
import importlib.util

import pytest
from test_mesh import CFG

from v4jax.planner import report_layout
from v4jax.planner.estimate import estimate
from v4jax.planner.hardware import hardware_of

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs the extra `tpu`: pip install -e '.[tpu]'",
    ),
]


def test_experts_by_exchange_send_what_they_must(capfd):
    # Rows are as wide as V4-Flash's: a TPU moves whole lanes, so narrow rows would weigh more than
    # they hold.
    model = CFG.model.replace(
        hidden_size=4096, num_hidden_layers=2, num_nextn_predict_layers=0, compress_ratios=(4, 128)
    )
    cfg = dataclasses.replace(
        CFG, model=model, mesh="fsdp=2,expert=2,tensor=2", layout="pod", dtype="bfloat16"
    )
    report = report_layout(cfg, "v5p:2x2x2", effort="full")  # as a run compiles
    assert report.effort == "full" and report.code_bytes > 0
    kinds = {(axes, kind) for axes, kind, *_ in report.collectives}
    assert ("expert", "ragged-all-to-all") in kinds
    sent, least = report.expert_bytes
    assert least <= sent <= 1.25 * least
    # XLA says on stderr when it cannot partition a lookup and copies its table to every device.
    assert "rematerialization" not in capfd.readouterr().err


def test_xla_estimates_each_part_of_a_step():
    model = CFG.model.replace(
        num_hidden_layers=2, num_hash_layers=0, num_nextn_predict_layers=0, compress_ratios=(4, 128)
    )
    cfg = dataclasses.replace(
        CFG, model=model, seq_len=512, mesh="expert=4", layout="ep_fsdp", dtype="bfloat16"
    )
    report = report_layout(cfg, "v5p:2x2x1", estimate="compiler")
    timing = report.timing
    assert report.effort == "full" and not timing.loops
    for part in ("attention", "attention scores", "mHC", "routed experts", "head", "compressors"):
        forward, backward = timing.parts[part]
        assert 0 < forward < timing.step_seconds and 0 < backward < timing.step_seconds, part
    assert timing.parts["optimizer"][0] > 0 and timing.parts["optimizer"][1] == 0
    # What belongs to no part is copies between loops, a small share.
    assert sum(timing.parts["other"]) < 0.2 * timing.computing_seconds
    kernels = [row for row in timing.unknown if row[1] == "tpu_custom_call"]
    assert {part for part, *_ in kernels} >= {"routed experts"}
    assert {axes for axes, *_ in timing.exchanges} == {"expert"}


def test_a_step_of_decoding_holds_what_the_estimate_says():
    model = CFG.model.replace(
        num_hidden_layers=2, num_hash_layers=0, num_nextn_predict_layers=0, compress_ratios=(4, 128)
    )
    cfg = dataclasses.replace(
        CFG, model=model, seq_len=1024, mesh="expert=4,tensor=2", layout="ep_tp", dtype="bfloat16"
    )
    report, paper = (
        report_layout(cfg, "v5e:2x4", what="decode"),
        estimate(cfg, hardware_of("v5e"), "decode"),
    )
    assert paper.memory["weights"] + paper.memory["caches"] == pytest.approx(
        report.state_bytes, rel=1e-2
    )
    assert sum(row[0] for row in paper.sent.values()) == pytest.approx(
        sum(row[3] for row in report.collectives), rel=0.25
    )
    assert report.effort == "quick"
    with pytest.raises(ValueError, match="effort: got 'O3'; known: quick, full"):
        report_layout(cfg, "v5e:2x4", effort="O3")


def test_optimizer_state_on_the_host_is_no_argument_of_the_device():
    model = CFG.model.replace(
        num_hidden_layers=1, num_hash_layers=0, num_nextn_predict_layers=0, compress_ratios=(4,)
    )
    cfg = dataclasses.replace(CFG, model=model, mesh="fsdp=4", layout="fsdp", dtype="bfloat16")
    here, there = (
        report_layout(dataclasses.replace(cfg, optimizer_memory=memory), "v5p:2x2x1")
        for memory in ("device", "host")
    )
    # Momentum is as large as its weights, and moments are twice. XLA adds a few pages.
    assert here.host_bytes == 0
    moved = here.state_bytes - there.state_bytes
    assert 0 <= there.host_bytes - moved < 2**16
    assert there.state_bytes < 0.51 * here.state_bytes
    # The peak of the device falls too: it does not hold the whole state at once.
    assert there.state_bytes + there.temporary_bytes < here.state_bytes + here.temporary_bytes


def test_more_micro_batches_need_no_more_memory():
    """Gradients are summed in place, and no loop holds weights in a layout of its own."""
    model = CFG.model.replace(
        hidden_size=1024,
        moe_intermediate_size=1024,
        n_routed_experts=16,
        num_hidden_layers=8,
        num_hash_layers=0,
        num_nextn_predict_layers=0,
        compress_ratios=(128,) * 8,
    )
    cfg = dataclasses.replace(
        CFG, model=model, seq_len=256, mesh="fsdp=4", layout="fsdp", dtype="bfloat16"
    )

    def temporary(count):
        one = dataclasses.replace(cfg, batch_size=4 * count, gradient_accumulation=count)
        return report_layout(one, "v5p:2x2x1").temporary_bytes

    assert temporary(4) <= 1.05 * temporary(1)
