"""The fewest micro-batches that fit: `auto`, the search of layouts, and the plan for a target."""

import dataclasses

import pytest

from configs import flash
from v4jax.planner.estimate import memory_of
from v4jax.planner.hardware import hardware_of
from v4jax.planner.micro_batches import chosen_micro_batches, least_micro_batches
from v4jax.planner.plan import head, plan
from v4jax.planner.search import search

V5P = hardware_of("v5p")
CFG = dataclasses.replace(flash.get_config(), stages=(), gradient_accumulation=1)


def need(count):
    return memory_of(dataclasses.replace(CFG, gradient_accumulation=count), V5P)


def test_the_least_number_that_fits_is_taken():
    """16 devices cut the rows, so a device has 1,152 of them."""
    has = 1.01 * need(36)
    found, bytes_needed = least_micro_batches(CFG, V5P, has)
    assert found.gradient_accumulation == 36 and bytes_needed == need(36) <= has < need(32)
    assert least_micro_batches(CFG, V5P, 1e15)[0].gradient_accumulation == 1
    # Nothing fits a byte: all rows apart.
    assert least_micro_batches(CFG, V5P, 1.0)[0].gradient_accumulation == 1152


def test_auto_becomes_a_number_for_every_stage():
    shipped = flash.get_config()
    stages = [dataclasses.replace(stage, gradient_accumulation=None) for stage in shipped.stages]
    cfg = dataclasses.replace(shipped, gradient_accumulation="auto", stages=tuple(stages))
    found = chosen_micro_batches(cfg, 95e9, V5P)
    counts = [found.gradient_accumulation, *(stage.gradient_accumulation for stage in found.stages)]
    assert counts == [24, 24, 24, 24, 24] and found.batch_size == 18_432
    with pytest.raises(ValueError, match=r"auto: 288 micro-batches of 16 rows still need .* GB"):
        chosen_micro_batches(cfg, 1e9, V5P)
    assert chosen_micro_batches(shipped, 1.0, V5P) is shipped  # a number is left alone


def test_the_search_takes_as_many_micro_batches_as_memory_asks_for():
    found = search(dataclasses.replace(CFG, mesh=""), V5P, 128)
    assert all(one.fits and one.batch == 18_432 and one.micro_batches > 1 for one in found.ranked)
    assert "micro-batches" in str(found.rows())


def test_the_plan_says_what_a_step_takes_on_a_target():
    stages = plan(flash.get_config(), "v5p:4x4x8")
    assert [stage.micro_batches for stage in stages] == [48, 48, 72, 72, 72]
    for stage in stages:
        assert stage.step.memory_bytes == stage.memory_bytes <= 95e9
        assert 0.3 < stage.step.mfu < 0.6 and len(stage.row()) == len(head("v5p:4x4x8"))
    # The optimizer moves once a step.
    parts = stages[0].step.parts
    assert parts["optimizer"][2] < 0.05 * stages[0].step.step_seconds
    with pytest.raises(ValueError, match="a plan needs --target"):
        plan(dataclasses.replace(CFG, gradient_accumulation="auto"))
    with pytest.raises(ValueError, match="v5p:2x2x1 has 4 devices; the mesh .* has 128"):
        plan(CFG, "v5p:2x2x1")
