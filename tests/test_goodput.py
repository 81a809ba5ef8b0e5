"""Every second of a run is in one part; waiting for data is named; the shares sum to 1."""

import concurrent.futures
import dataclasses
import re
import time

import jax
import numpy as np
import pytest
from small_runs import small_run, write_text

from v4jax.train import goodput, run_steps
from v4jax.train.goodput import PARTS, Clock
from v4jax.train.loop import train
from v4jax.train.metrics_file import read_metrics
from v4jax.train.picture import write_summary
from v4jax.train.stability import StabilityConfig
from v4jax.train.stages import Batches

SLEEP = 0.3
"""Seconds that a batch of the slow source takes; a step takes a small part of that."""


class FakeTime:
    """Time that passes only when told."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def fake(monkeypatch):
    found = FakeTime()
    monkeypatch.setattr(goodput, "time", found)
    return found


def ended_at(moment):
    done = concurrent.futures.Future()
    done.set_result(moment)
    return done


def test_time_counts_for_the_innermost_part(fake):
    clock = Clock()
    fake.now += 1
    with clock.step(1):
        fake.now += 2
        with clock.compiling():
            fake.now += 4
        fake.now += 8
    with clock.part("save"):
        fake.now += 16
    fake.now += 32
    found = {name: value for name, value in clock.seconds().items() if value}
    assert found == {"other": 33, "step": 10, "compile": 4, "save": 16}
    assert clock.metrics()["goodput"] == 10 / 63
    clock.close()


def test_a_program_that_compiles_by_the_way_is_compile_time(fake):
    clock = Clock()
    with clock.part("save"):
        jax.jit(lambda x: x * 5 + 2)(np.ones(3)).block_until_ready()
        fake.now += 9
    compiled = clock.seconds()["compile"]
    assert 0 < compiled < 9 and clock.seconds()["save"] == 9 - compiled
    clock.close()
    jax.jit(lambda x: x * 5 + 3)(np.ones(3)).block_until_ready()
    assert clock.seconds()["compile"] == compiled


@pytest.mark.parametrize("left, waited", [(0, 4), (1, 3), (4, 0), (9, 0)])
def test_only_what_devices_wait_for_is_data_wait(fake, left, waited):
    """A draw takes 4 s, and the step before it ends `left` seconds after the draw begins."""

    def slow():
        while True:
            fake.now += 4
            yield "batch"

    clock = Clock()
    batches = clock.draws(slow())
    with clock.step(1):
        assert next(batches) == "batch"
    clock._step_end = ended_at(fake.now + left) if left < 9 else concurrent.futures.Future()
    clock.line()
    with clock.step(2):
        next(batches)
    found = clock.line()
    assert found["seconds_data_wait"] == 4 + waited
    assert found["seconds_step"] == 4 - waited
    assert found["data_wait"] == waited / 4
    clock.close()


def test_steps_that_repeat_are_lost_to_the_rollback(fake):
    clock = Clock()
    for number in range(1, 6):
        with clock.step(number):
            fake.now += 1
    clock.went_back(5)
    for number in range(3, 8):
        with clock.step(number):
            fake.now += 1
    assert clock.seconds()["step"] == 7 and clock.seconds()["rollback"] == 3
    clock.close()


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    return small_run(
        write_text(tmp_path_factory.mktemp("text"), documents=8),
        tmp_path_factory.mktemp("a") / "run",
        steps=8,
        log_every=4,
        eval_every=4,
        eval_batches=1,
        checkpoint_every=4,
    )


def seconds(found):
    return {part: found[f"seconds_{part}"] for part in PARTS}


def test_a_slow_source_is_named_with_its_share(cfg, monkeypatch, capsys):
    draw = Batches.__next__

    def slow(batches):
        time.sleep(SLEEP)
        return draw(batches)

    monkeypatch.setattr(Batches, "__next__", slow)
    start = time.perf_counter()
    summary = train(cfg)
    wall = time.perf_counter() - start
    lines = [line for line in read_metrics(cfg.run_dir) if "goodput" in line]
    assert [line["step"] for line in lines] == [1, 4, 8]
    for found in (*lines, summary):
        parts = seconds(found)
        assert min(parts.values()) >= 0
        shares = [value / sum(parts.values()) for value in parts.values()]
        assert sum(shares) == pytest.approx(1)
        assert found["goodput"] == parts["step"] / sum(parts.values())
    parts = seconds(summary)
    assert sum(parts.values()) == pytest.approx(wall, abs=0.5)
    for part in ("compile", "step", "evaluation", "save", "other"):
        assert parts[part] > 0, part
    assert parts["restore"] == parts["rollback"] == 0
    # The first step compiles while nothing is drawn; the last ones hide a part of a draw.
    assert 0.5 * 8 * SLEEP < parts["data_wait"] < 8 * SLEEP + 3
    assert "data_wait" not in lines[0] and lines[2]["data_wait"] > 0.5
    said = re.findall(
        r"step (\d)/8 .* WARNING: (\d+)% of step time is data wait \(above 5%\)",
        capsys.readouterr().out,
    )
    assert said == [(str(line["step"]), f"{100 * line['data_wait']:.0f}") for line in lines[1:]]


def test_a_resumed_run_has_its_own_clock_and_restores(cfg):
    start = time.perf_counter()
    summary = train(dataclasses.replace(cfg, steps=10))
    wall = time.perf_counter() - start
    parts = seconds(summary)
    assert parts["restore"] > 0 and sum(parts.values()) == pytest.approx(wall, abs=0.5)
    assert write_summary(cfg.run_dir).is_file()


def test_a_run_that_went_back_counts_what_it_repeats(cfg, tmp_path, monkeypatch):
    stability = StabilityConfig(rollbacks=1, proven=1)
    real = run_steps.spike

    def once(config, history, loss, norm):
        spiked = len(history.losses) == 6 and not history.rollbacks
        return "made up" if spiked else real(config, history, loss, norm)

    monkeypatch.setattr(run_steps, "spike", once)
    summary = train(dataclasses.replace(cfg, run_dir=str(tmp_path / "run"), stability=stability))
    (back,) = [line for line in read_metrics(tmp_path / "run") if line.get("event") == "rollback"]
    assert (back["at"], back["step"]) == (7, 4)
    parts = seconds(summary)
    assert parts["rollback"] > 0 and parts["restore"] > 0
