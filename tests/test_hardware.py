"""Hardware profiles: one data file, a source for every figure, one line for what is unknown."""

import json

import pytest

from v4jax.planner.hardware import hardware_of, known, nearest, target_of
from v4jax.planner.measure import measure


@pytest.mark.parametrize("name", known())
def test_every_figure_has_a_source_and_a_sane_size(name):
    entry, hardware = known()[name], hardware_of(name)
    if name == "cpu":
        assert "measured" in entry["sources"]["all"] and hardware.shared
        return
    for figure in ("bf16_flops", "fp8_flops", "hbm_bytes", "hbm_bandwidth", "tiers"):
        assert entry["sources"][figure], figure
    assert 1e14 < hardware.bf16_flops <= hardware.fp8_flops < 1e16
    assert 1e10 < hardware.hbm_bytes < 1e12 and 5e11 < hardware.hbm_bandwidth < 1e13
    for figure in ("tf32_flops", "host_bandwidth"):  # where they are known
        assert (figure in entry) == (figure in entry["sources"])
    assert hardware.tf32_flops in (0, pytest.approx(hardware.bf16_flops / 2, rel=0.03))
    assert hardware.host_bandwidth < hardware.hbm_bandwidth / 10
    # The last tier reaches any number of devices, and each is slower than the one before.
    rates = [tier.bandwidth for tier in hardware.tiers]
    assert hardware.tiers[-1].size == 0 and rates == sorted(rates, reverse=True)


def test_a_target_is_a_chip_and_a_number():
    assert target_of("v5p:4x4x8").devices == 128 and target_of("v5p:4x4x8").topology == "v5p:4x4x8"
    assert target_of("tpu7x:2x2x1").devices == 8  # two devices a chip
    assert target_of("b200:64").devices == 64 and target_of("b200:64").topology == ""
    assert target_of("h200:64").topology == "h200:64"
    assert target_of("cpu", 8).devices == 8


def test_a_device_of_a_chip_has_its_share():
    chip = hardware_of("tpu7x")
    device = chip.of_a_device(8)
    assert (
        device.bf16_flops == chip.bf16_flops / 2
        and device.tiers[0].bandwidth == chip.tiers[0].bandwidth / 2
    )
    assert hardware_of("cpu").of_a_device(8).hbm_bandwidth == hardware_of("cpu").hbm_bandwidth / 8


def test_the_users_own_file_is_a_target(tmp_path):
    entry = {
        "bf16_flops": 1e15,
        "fp8_flops": 2e15,
        "hbm_bytes": 1e11,
        "hbm_bandwidth": 3e12,
        "tiers": [{"bandwidth": 1e11}],
        "price": 2.5,
    }
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(entry))
    assert target_of(f"{path}:16").devices == 16 and hardware_of(str(path)).price == 2.5
    path.write_text(json.dumps(entry | {"hbm": 1}))
    with pytest.raises(ValueError, match="has 'hbm'; allowed"):
        hardware_of(str(path))
    del entry["tiers"]
    path.write_text(json.dumps(entry))
    with pytest.raises(ValueError, match="lacks tiers"):
        hardware_of(str(path))


@pytest.mark.parametrize(
    "text, line",
    [
        ("v6p:4x4", "nearest: v6e"),
        ("h100:x", "must be chips"),
        ("h100:0", "must be chips"),
        ("none.json:4", "none.json"),
    ],
)
def test_an_unknown_target_is_one_line(text, line):
    with pytest.raises(ValueError, match=line):
        target_of(text)
    assert nearest("gb200", known()) in ("gb300", "b200")


def test_this_machine_can_be_measured():
    found = measure(2)
    assert found["shared"] and all(
        found[name] > 0 for name in ("bf16_flops", "hbm_bandwidth", "latency")
    )
    assert found["tiers"][0]["bandwidth"] > 0 and found["hbm_bytes"] > 1e9
