"""The estimated memory of a step beside every program whose memory was recorded when it compiled.

benchmarks/layout_accuracy.jsonl and remat_accuracy.jsonl hold the compilers' figures; the estimates
are made here. Figures of XLA:CPU are left out: it plans temporary memory for no device that exists.
"""

import dataclasses
import importlib
import pathlib
import sys

import pytest

from sharding.mesh import parse_mesh
from v4jax.planner.estimate import USABLE, estimate
from v4jax.planner.hardware import target_of
from v4jax.planner.micro_batches import least_micro_batches

BENCHMARKS = str(pathlib.Path(__file__).parent.parent / "benchmarks")


def recorded():
    """Case -> (its training config, its target, bytes that the compiler reported)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        layouts, remat = map(importlib.import_module, ("layout_accuracy", "remat_accuracy"))
    found = {}
    for name, (row, _) in layouts.recorded().items():
        cfg, target = layouts.config(name)
        if target != "cpu":
            found[name] = cfg, target, row["state"] + row["temporary"]
    for name, (row, _) in remat.recorded().items():
        size = row["state_bytes"] + row["temporary_bytes"]
        found[f"remat-{name}"] = remat.config(name), remat.TARGET, size
    return found


RECORDED = recorded()


def hardware_for(cfg, target):
    devices = 1
    for size in parse_mesh(cfg.mesh).values():
        devices *= size
    return target_of(target, devices).hardware, devices


def test_the_record_has_what_the_bar_asks_for():
    """At least eight cases of accumulation and remat policies, and each policy among them."""
    cases = [cfg for cfg, *_ in RECORDED.values() if cfg.micro_batches > 1 or cfg.remat != "layer"]
    assert len(cases) >= 8 and "jax" in sys.modules
    assert {cfg.remat for cfg in cases} == {
        "none", "layer", "attention", "experts", "dots", "offload"
    }  # fmt: skip


@pytest.mark.parametrize("name", RECORDED)
def test_estimated_memory_is_within_a_tenth_of_the_compiled(name):
    cfg, target, compiled = RECORDED[name]
    hardware, _ = hardware_for(cfg, target)
    assert estimate(cfg, hardware).memory_bytes == pytest.approx(compiled, rel=0.1)


@pytest.mark.parametrize("name", RECORDED)
def test_nothing_fits_a_device_that_the_compiled_program_fills(name):
    """On a device that the program leaves less than libtpu's 3%, the search says: no fit."""
    cfg, target, compiled = RECORDED[name]
    hardware, devices = hardware_for(cfg, target)
    smaller = dataclasses.replace(
        hardware, hbm_bytes=compiled / 0.97 * 0.999 * hardware.devices_per_chip
    )
    assert not estimate(cfg, smaller).fits
    has = USABLE * smaller.of_a_device(devices).hbm_bytes
    found, need = least_micro_batches(cfg, smaller, has)
    assert need > has or found.micro_batches > cfg.micro_batches
