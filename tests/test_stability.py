"""Spikes are found, undone and survived; the memory of them outlives the process."""

import contextlib
import dataclasses
import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import small_config

import v4jax
from v4jax.checkpoint.store import Store
from v4jax.data.config import DataConfig, tokenizer_of
from v4jax.train import loop, run_steps
from v4jax.train.config import TrainConfig
from v4jax.train.prepare import stage_batches
from v4jax.train.stability import (
    LossHistory,
    StabilityConfig,
    TrainingFailed,
    gone_back,
    remember,
    spike,
)
from v4jax.train.stages import Stage

MODEL = small_config(
    vocab_size=260,
    num_hidden_layers=1,
    compress_ratios=(0,),
    num_hash_layers=0,
    num_nextn_predict_layers=0,
    hidden_size=32,
    moe_intermediate_size=32,
    num_attention_heads=4,
    o_groups=2,
    q_lora_rank=16,
    n_routed_experts=4,
)
GUARD = StabilityConfig(rollbacks=3, window=8, least=4, loss_rise=0.5, norm_rise=8.0)
AHEAD = dataclasses.replace(GUARD, anticipate=4, anticipate_lag=2)
KEPT = (
    "step",
    "loss",
    "grad_norm",
    "held_out_nll",
    "event",
    "rollback",
    "at",
    "why",
    "skipped",
    "losses_given_up",
    "anticipating",
)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """One of three letters follows each, at random: soon learnt, with a floor of ln 3 nats."""
    folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for i in range(40):
        letters = itertools.accumulate(
            rng.integers(0, 3, 1500), lambda letter, turn: (3 * letter + turn + 1) % 8
        )
        (folder / f"{i}.txt").write_text("".join("abcdefgh"[letter] for letter in letters))
    return folder


@pytest.fixture(scope="module")
def compiled():
    """One program per mesh and kind for the whole file."""
    return {}


class Harmed:
    """Stands for the jitted step and harms batches, which are known by their first row.

    Some become noise, the updates of some are inflated, and some put a NaN into two weights.
    """

    def __init__(self, key, real, compiled, noise=(), inflate=(), poison=()):
        self.key, self.real, self.compiled = key, real, compiled
        self.noise, self.inflate, self.poison = noise, inflate, poison

    def lower(self, *arguments):
        self.arguments = arguments
        return self

    def compile(self):
        if self.key not in self.compiled:
            self.compiled[self.key] = self.real.lower(*self.arguments).compile()
        return self

    def __call__(self, state, batch, *chosen):
        step, row = self.compiled[self.key], np.asarray(batch["tokens"])[0]
        if any(np.array_equal(row, bad) for bad in self.noise):
            noise = np.random.default_rng(0).integers(0, 256, batch["tokens"].shape, np.int32)
            batch = batch | {"tokens": jax.device_put(noise, batch["tokens"].sharding)}
        if any(np.array_equal(row, bad) for bad in self.poison):
            return self._poisoned(*step(state, batch, *chosen))
        if not any(np.array_equal(row, bad) for bad in self.inflate):
            return step(state, batch, *chosen)
        before = jax.tree.map(jnp.copy, state.params)
        state, metrics = step(state, batch, *chosen)
        inflated = jax.tree.map(lambda new, old: old + 100 * (new - old), state.params, before)
        return dataclasses.replace(state, params=inflated), metrics

    @staticmethod
    def _poisoned(state, metrics):
        def nan_in(path, leaf):
            return leaf.at[0, 0].set(jnp.nan) if path[0].key in ("embed", "head") else leaf

        params = jax.tree_util.tree_map_with_path(nan_in, state.params)
        return dataclasses.replace(state, params=params), metrics


@pytest.fixture
def train(monkeypatch, compiled):
    """train(cfg, noise=, inflate=): a run with those batches harmed."""
    real = run_steps.compile_step

    def run(cfg, **harm):
        def harmed(*arguments, **kind):
            return Harmed(
                (cfg.mesh, arguments[0].batch_size, *kind.values()),
                real(*arguments, **kind),
                compiled,
                **harm,
            )

        monkeypatch.setattr(run_steps, "compile_step", harmed)
        return loop.train(cfg)

    return run


def config(text_folder, run, **changes) -> TrainConfig:
    fields = dict(
        model=MODEL,
        data=DataConfig(source=str(text_folder), held_out=0.1),
        run_dir=str(run),
        steps=40,
        batch_size=4,
        seq_len=48,
        learning_rate=1e-2,
        warmup_steps=2,
        decay_steps=20,
        log_every=5,
        eval_every=40,
        eval_batches=4,
        checkpoint_every=5,
        remat=False,
        export="none",
        stability=GUARD,
    )
    return TrainConfig(**fields | changes)


def lines(cfg):
    text = (pathlib.Path(cfg.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [{name: line[name] for name in KEPT if name in line} for line in map(json.loads, text)]


def rows(cfg, count: int):
    """The first row of each of the run's first batches."""
    data = stage_batches(cfg, tokenizer_of(cfg.data), None)
    return [next(data)["tokens"][0] for _ in range(count)]


def same_weights(a, b):
    for x, y in zip(
        jax.tree.leaves(v4jax.load(a)[1]), jax.tree.leaves(v4jax.load(b)[1]), strict=True
    ):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def clean(text_folder, tmp_path_factory, compiled):
    cfg = config(text_folder, tmp_path_factory.mktemp("clean") / "run")
    with pytest.MonkeyPatch.context() as patch:
        real = run_steps.compile_step
        patch.setattr(
            run_steps,
            "compile_step",
            lambda *a, **kind: Harmed(
                (cfg.mesh, cfg.batch_size, *kind.values()), real(*a, **kind), compiled
            ),
        )
        return cfg, loop.train(cfg)


def test_what_counts_as_a_spike():
    history = LossHistory()
    for i in range(16):
        assert spike(GUARD, history, 1e9, 1.0) is None or i >= 4  # too few steps to tell
        history = remember(GUARD, history, 4 + 0.01 * (-1) ** i, 1.0)
    assert spike(GUARD, history, 4.4, 1.0) is None and spike(GUARD, history, 3.0, 1e-9) is None
    assert spike(GUARD, history, 4.6, 1.0) == "loss is 4.6, above 4.5"
    assert spike(GUARD, history, 4.0, 8.1) == "grad_norm is 8.1, above 8"
    assert spike(GUARD, LossHistory(), math.nan, 1.0) == "loss is nan"
    assert spike(GUARD, LossHistory(), 1.0, math.inf) == "grad_norm is inf"
    noisy = LossHistory(
        losses=tuple(4 + 0.2 * (-1) ** i for i in range(16)), grad_norms=(1.0,) * 16
    )
    assert spike(GUARD, noisy, 7.3, 1.0) is None and spike(
        GUARD, noisy, 7.4, 1.0
    )  # 8 deviations of 0.42
    falling = LossHistory(losses=tuple(8 - 0.05 * i for i in range(16)), grad_norms=(1.0,) * 16)
    assert spike(GUARD, falling, 8.2, 1.0)
    off = StabilityConfig()
    assert (
        spike(off, history, 1e9, 1e9) is None
        and spike(off, history, math.nan, 1.0)
        and remember(off, history, 1.0, 1.0) is history
    )


def test_batches_are_counted_past_what_was_skipped():
    history = gone_back(AHEAD, LossHistory(), 14, LossHistory(), 10, drawn=14)
    assert (
        history.skipped == ((11, 14),)
        and history.batch(11) == 15
        and history.anticipate_until == 18
    )
    again = gone_back(AHEAD, history, 12, LossHistory(), 10, drawn=history.batch(12))
    assert again.skipped == ((11, 16),) and again.rollbacks == 2 and again.anticipate_until == 18
    later = gone_back(AHEAD, again, 23, again, 20, drawn=again.batch(23))
    assert (
        later.skipped == ((11, 16), (27, 29))
        and later.batch(21) == 30
        and LossHistory.from_json(json.loads(json.dumps(later.to_json()))) == later
    )


@pytest.mark.parametrize(
    "mesh",
    ["", pytest.param("data=2,expert=2,tensor=2", marks=pytest.mark.long)],
    ids=["one device", "eight devices"],
)
def test_spikes_are_survived(clean, train, tmp_path, mesh):
    """Noise at step 18 and an update 100 times too long at step 32 do not change how the run ends.

    The update shows at step 33.
    """
    cfg = dataclasses.replace(
        clean[0], run_dir=str(tmp_path / "run"), mesh=mesh, stability=AHEAD if mesh else GUARD
    )
    order = rows(cfg, 40)
    summary = train(
        cfg, noise=order[17:18], inflate=order[34:35]
    )  # step 16 trains on batch 19 then, step 32 on 35
    events = [line for line in lines(cfg) if "event" in line]
    assert [(event["step"], event["at"], event["skipped"]) for event in events] == [
        (15, 18, [16, 18]),
        (30, 33, [34, 36]),
    ]
    assert (
        len(events[0]["losses_given_up"]) == 3
        and max(events[0]["losses_given_up"]) == events[0]["losses_given_up"][-1]
    )
    steps = [line["step"] for line in lines(cfg) if "loss" in line]
    assert steps == sorted(set(steps)) and steps[-1] == 40
    assert summary["held_out_nll"] == pytest.approx(clean[1]["held_out_nll"], rel=0.01)
    note = json.loads((tmp_path / "run/checkpoints/40/record/note.json").read_text())
    assert note["rollbacks"] == 2 and note["skipped"] == [[16, 18], [34, 36]]


@pytest.mark.slow
def test_without_rollbacks_the_harm_stays(clean, train, tmp_path):
    """Hence the test above can fail."""
    off = dataclasses.replace(clean[0], run_dir=str(tmp_path / "run"), stability=StabilityConfig())
    order = rows(off, 40)
    summary = train(off, noise=order[17:18], inflate=order[31:32])
    assert summary["held_out_nll"] > 1.05 * clean[1]["held_out_nll"] and not [
        line for line in lines(off) if "event" in line
    ]


@pytest.mark.slow
def test_a_checkpoint_that_was_already_bad_is_left_behind(clean, train, tmp_path, monkeypatch):
    """The update of step 10 does the harm that step 11 shows: the checkpoint of step 10 is bad.

    The run is killed and resumed on the way, before the next checkpoint and just after it, with
    batches drawn ahead and their experts chosen. It ends with the same bits.
    """
    whole = dataclasses.replace(
        clean[0],
        run_dir=str(tmp_path / "whole"),
        steps=20,
        decay_steps=0,
        eval_batches=0,
        stability=dataclasses.replace(AHEAD, norm_rise=4.0),
    )
    order = rows(whole, 20)
    train(whole, inflate=order[9:10])
    (event,) = [line for line in lines(whole) if "event" in line]
    assert (event["step"], event["at"], event["skipped"]) == (5, 11, [6, 11])
    assert {line["step"] for line in lines(whole) if line.get("anticipating")} == {
        10,
        15,
    }  # of the logged steps: 6 to 15
    assert [path.name.split("-")[0] for path in (tmp_path / "whole/abandoned").iterdir()] == ["10"]

    killed = dataclasses.replace(whole, run_dir=str(tmp_path / "killed"))
    load, save, deaths = Store.load, Store.save, ["going back", 10]

    def load_or_die(store, step, items):
        if "data" not in items and deaths[0] == "going back":
            raise KeyboardInterrupt(deaths.pop(0))
        return load(store, step, items)

    def save_then_die(store, step, items, loss):
        save(store, step, items, loss)
        if deaths[0] == step and items["record"].value["rollbacks"]:
            raise KeyboardInterrupt(deaths.pop(0))

    monkeypatch.setattr(Store, "load", load_or_die)
    monkeypatch.setattr(Store, "save", save_then_die)
    for words in ("going back", "10"):
        with pytest.raises(KeyboardInterrupt, match=words):
            train(killed, inflate=order[9:10])
    deaths.append(None)
    train(killed, inflate=order[9:10])
    same_weights(whole.run_dir, killed.run_dir)
    assert [
        line
        for line in lines(killed)
        if "event" in line or line["step"] % 5 == 0 or line["step"] == 1
    ] == lines(whole)


def test_rollbacks_are_bounded(clean, train, tmp_path):
    """Endless noise is no accident: the run stops, and what it had is there."""
    cfg = dataclasses.replace(clean[0], run_dir=str(tmp_path / "run"), eval_batches=0)
    with pytest.raises(
        TrainingFailed, match=r"step 26: loss is .* after 3 rollback\(s\); last checkpoint: 25"
    ):
        train(cfg, noise=rows(cfg, 31)[27:])
    assert [line["rollback"] for line in lines(cfg) if "event" in line] == [1, 2, 3]


def is_whole(run, step: int) -> bool:
    """Whether the run's newest checkpoint is that of `step`, intact and finite."""
    with Store(run) as store:
        newest = store.latest_intact()
    return newest == step and all(np.isfinite(x).all() for x in jax.tree.leaves(v4jax.load(run)[1]))


NAN = r"params/embed/weight, params/head/weight are not finite"


@pytest.mark.parametrize("mesh", ["", pytest.param("fsdp=2,expert=2", marks=pytest.mark.long)])
def test_a_state_that_is_not_finite_is_neither_saved_nor_evaluated(clean, train, tmp_path, mesh):
    """The update of step 10 makes the NaN, which no loss shows before both are due."""
    changes = dict(mesh=mesh, stability=StabilityConfig(), eval_every=10)
    cfg = dataclasses.replace(clean[0], run_dir=str(tmp_path / "run"), **changes)
    with pytest.raises(TrainingFailed, match=rf"step 10: {NAN}; last checkpoint: 5$"):
        train(cfg, poison=rows(cfg, 10)[9:])
    assert is_whole(cfg.run_dir, 5)
    assert not [line for line in lines(cfg) if "held_out_nll" in line]
    assert not (tmp_path / "run/export").exists()


def test_an_evaluation_without_a_checkpoint_looks_too_and_so_does_the_end(clean, train, tmp_path):
    changes = dict(stability=StabilityConfig(), eval_every=7, steps=8, decay_steps=0)
    cfg = dataclasses.replace(clean[0], run_dir=str(tmp_path / "run"), **changes)
    order = rows(cfg, 8)
    with pytest.raises(TrainingFailed, match=f"step 7: {NAN}"):
        train(cfg, poison=order[6:7])
    last = dataclasses.replace(cfg, export="float32", eval_every=40)
    with pytest.raises(TrainingFailed, match=f"step 8: {NAN}"):
        train(last, poison=order[7:])
    assert is_whole(cfg.run_dir, 5) and not (tmp_path / "run/export").exists()


def test_a_run_goes_back_behind_a_state_that_is_not_finite(clean, train, tmp_path):
    changes = dict(steps=15, decay_steps=0, eval_batches=0)
    cfg = dataclasses.replace(clean[0], run_dir=str(tmp_path / "run"), **changes)
    train(cfg, poison=rows(cfg, 10)[9:])
    (event,) = [line for line in lines(cfg) if "event" in line]
    assert (event["step"], event["at"], event["why"], event["skipped"]) == (5, 10, NAN, [6, 10])
    assert is_whole(cfg.run_dir, 15)


def test_weights_and_checkpoints_that_are_not_finite_are_refused(clean, train, tmp_path):
    """The refusal comes before a step. Given weights leave no run; a checkpoint names a way out."""
    model, weights = v4jax.load(clean[0].run_dir)
    weights["head"]["weight"] = weights["head"]["weight"].at[1, 2].set(jnp.inf)
    v4jax.save_safetensors(model, weights, tmp_path / "given", dtype="float32")
    changes = dict(init_from=str(tmp_path / "given"), steps=10, decay_steps=0, eval_batches=0)
    cfg = dataclasses.replace(clean[0], run_dir=str(tmp_path / "run"), **changes)
    with pytest.raises(ValueError, match=r"init_from: .*given: params/head/weight is not finite$"):
        train(cfg)
    assert not (tmp_path / "run").exists()

    cfg = dataclasses.replace(cfg, init_from="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_steps, "not_finite", lambda state: None)  # older versions did not check
        train(cfg, poison=rows(cfg, 10)[9:])
    with pytest.raises(ValueError, match=rf"checkpoints/10: {NAN}; remove this folder to resume"):
        train(dataclasses.replace(cfg, steps=12))
    (tmp_path / "run/checkpoints/10").rename(tmp_path / "10")
    train(cfg)
    assert is_whole(cfg.run_dir, 10)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep": 1}, "keep: got 1; must be at least 2 with stability.rollbacks"),
        ({"checkpoint_every": 1}, "checkpoint_every: got 1; must be above stability.proven=1"),
    ],
)
def test_settings_that_cannot_work_are_refused(clean, changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(clean[0], **changes)
    with pytest.raises(ValueError, match="stability.least: got 99; must be in \\[2, window=64\\]"):
        StabilityConfig(least=99)


def test_a_spike_soon_after_a_change_of_stage_goes_back_before_it(train, text_folder, tmp_path):
    """The checkpoint is of step 9, the batch grows from step 11, and a spike follows.

    It comes once five steps of the new batch are known.
    """
    cfg = config(
        text_folder,
        tmp_path / "run",
        steps=20,
        decay_steps=5,
        checkpoint_every=9,
        log_every=1,
        eval_batches=0,
        stages=(Stage(after=10, batch_size=8),),
    )
    later = dataclasses.replace(
        cfg, stages=(), batch_size=8, data=dataclasses.replace(cfg.data, seed=cfg.data.seed + 1)
    )
    train(
        cfg, noise=rows(later, 5)[-1:]
    )  # the fifth batch of the later stage's own stream, step 15
    events = [line for line in lines(cfg) if "event" in line]
    assert [
        (line["event"], line["at"], line["step"]) for line in events if line["event"] == "rollback"
    ] == [("rollback", 15, 9)]
    raw = [
        json.loads(line)
        for line in (pathlib.Path(cfg.run_dir) / "metrics.jsonl").read_text().splitlines()
    ]
    stages = {line["step"]: line["stage"] for line in raw if "stage" in line and "loss" in line}
    assert stages == {step: int(step > 10) for step in range(1, 21)}
    losses = [line["loss"] for line in raw if "loss" in line and line["step"] > 15]
    assert np.isfinite(losses).all() and max(losses) < math.log(260)


def test_a_run_ended_after_going_back_across_a_change_of_stage_goes_on_past_the_skipped_batches(
    train, text_folder, tmp_path, monkeypatch
):
    """As above, with experts chosen ahead from step 10 to step 19.

    One of two runs is asked to end at step 10, where it still is in the first stage but has drawn
    from both streams. It must come to the same weights: it neither meets the noise again nor loses
    what it drew.
    """
    cfg = config(
        text_folder,
        tmp_path / "run",
        steps=20,
        decay_steps=5,
        checkpoint_every=9,
        log_every=1,
        eval_batches=0,
        stability=AHEAD,
        stages=(Stage(after=10, batch_size=8),),
    )
    later = dataclasses.replace(
        cfg, stages=(), batch_size=8, data=dataclasses.replace(cfg.data, seed=cfg.data.seed + 1)
    )
    noise = rows(later, 5)[-1:]
    train(cfg, noise=noise)
    ended = dataclasses.replace(cfg, run_dir=str(tmp_path / "ended"))
    with monkeypatch.context() as patch:
        patch.setattr(
            run_steps, "stop_requests", lambda: contextlib.nullcontext(lambda turn: turn == 16)
        )
        assert train(ended, noise=noise)["stopped_at"] == 10
    assert (tmp_path / "ended/checkpoints/10/data/stream-1").is_dir()
    train(ended, noise=noise)
    for one in (cfg, ended):
        ahead = {
            line["step"]: line["anticipating"] for line in lines(one) if "anticipating" in line
        }
        assert ahead == {step: float(10 <= step <= 19) for step in range(1, 21)}
    same_weights(cfg.run_dir, ended.run_dir)
