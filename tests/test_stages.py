"""A run in stages: the plan, its refusals, what each stage trains and what it does not touch.

A killed run continues in any stage.
"""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from small_runs import small_run, write_text
from trees import small_config

from configs.demo import get_config
from v4jax.checkpoint.store import Store
from v4jax.context import SparseMode
from v4jax.parameter_tree import abstract_params
from v4jax.planner.plan import plan
from v4jax.train.config import TrainConfig
from v4jax.train.loop import train
from v4jax.train.stages import Stage, number_at, stage_at, stream_at
from v4jax.train.step import sparse_mode

MODEL = small_config(
    vocab_size=260,
    num_hidden_layers=1,
    compress_ratios=(4,),
    num_hash_layers=0,
    num_nextn_predict_layers=0,
    hidden_size=32,
    moe_intermediate_size=16,
    index_topk=2,
)
STAGES = (
    Stage(after=4, batch_size=4, seq_len=48),
    Stage(after=8, attention="indexer"),
    Stage(after=16, attention="sparse"),
)


def config(folder, run_dir, **changes) -> TrainConfig:
    fields = dict(
        model=MODEL,
        steps=20,
        index_learning_rate=2e-2,
        log_every=1,
        checkpoint_every=2,
        keep=20,
        attention="dense",
        stages=STAGES,
    )
    return small_run(folder, run_dir, **fields | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    cfg = config(folder, tmp_path_factory.mktemp("a") / "run")
    train(cfg)
    return cfg


def weights(cfg, step):
    """Path -> array, of the checkpoint after `step`."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract_params(MODEL),
    )
    with Store(cfg.run_dir) as store:
        return flatten_dict(
            jax.tree.map(np.asarray, store.load(step, {"params": abstract})["params"])
        )


def test_the_plan():
    cfg = config("x", "y")
    assert [number_at(cfg, done) for done in (0, 3, 4, 8, 19)] == [0, 0, 1, 2, 3]
    assert [stream_at(cfg, done) for done in (0, 4, 8, 19)] == [
        0,
        1,
        1,
        1,
    ]  # only a batch of another shape is another stream
    views = [stage_at(cfg, done) for done in (3, 4, 8, 16)]
    assert [(view.batch_size, view.seq_len, view.attention) for view in views] == [
        (2, 32, "dense"),
        (4, 48, "dense"),
        (4, 48, "indexer"),
        (4, 48, "sparse"),
    ]
    assert [sparse_mode(view) for view in views] == [
        SparseMode(dense=True, train_indexer=False),
        SparseMode(dense=True, train_indexer=False),
        SparseMode(dense=True, train_indexer=True),
        SparseMode(dense=False, train_indexer=True),
    ]
    late = dataclasses.replace(cfg, stages=(Stage(after=5, mtp=0.1),))
    assert (stage_at(late, 4).loss.mtp, stage_at(late, 5).loss.mtp) == (0.3, 0.1)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(stages=(Stage(after=0),)),
            r"stages\[0\].after: got 0; must be above 0 and below steps=20",
        ),
        (dict(stages=(Stage(after=5), Stage(after=5))), r"stages\[1\].after: got 5"),
        (dict(stages=(Stage(after=20),)), r"stages\[0\].after: got 20"),
        (
            dict(stages=(Stage(after=2, attention="sparce"),)),
            r"stages\[0\]: attention: got 'sparce'; allowed",
        ),
        (dict(stages=(Stage(after=2, seq_len=1),)), r"stages\[0\]: seq_len: got 1"),
        (dict(stages=(Stage(after=2, mtp=-1.0),)), r"stages\[0\]: loss weight mtp: got -1.0"),
        (
            dict(index_learning_rate=0.0),
            r"stages\[1\]: index_learning_rate: got 0.0; must be above 0 with attention 'indexer'",
        ),
        (dict(model=MODEL.replace(compress_ratios=(0,)), stages=()), "has no indexer"),
    ],
)
def test_bad_stages_are_refused_before_anything_runs(changes, message):
    with pytest.raises(ValueError, match=message):
        config("x", "y", **changes)


def test_each_stage_trains_its_part_and_leaves_the_other_bit_for_bit(finished):
    at = {step: weights(finished, step) for step in (2, 8, 16, 20)}

    def moved(before, after):
        pairs = [
            ("indexer" in path, np.array_equal(at[before][path], at[after][path]))
            for path in at[before]
        ]
        return {
            kind: [not same for index, same in pairs if index == kind] for kind in (False, True)
        }

    dense, alone, sparse = moved(2, 8), moved(8, 16), moved(16, 20)
    assert not any(dense[True]) and sum(dense[False]) > 15
    assert not any(alone[False]) and all(alone[True])
    assert all(sparse[True]) and sum(sparse[False]) > 15


def test_the_indexer_learns_alone_and_metrics_say_so(finished):
    lines = [
        json.loads(line)
        for line in (pathlib.Path(finished.run_dir) / "metrics.jsonl").read_text().splitlines()
    ]
    lines = {line["step"]: line for line in lines if "loss" in line}
    assert [lines[step]["stage"] for step in (1, 4, 5, 8, 9, 16, 17, 20)] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert "index_kl" not in lines[8] and "index_kl" in lines[17]
    assert lines[16]["index_captured"] > lines[9]["index_captured"] + 0.1
    assert lines[16]["index_kl"] < lines[9]["index_kl"]


def test_a_run_killed_in_any_stage_continues_bit_for_bit(finished, folder, tmp_path, monkeypatch):
    """The run dies inside the second stage, at a change of batch, and at a change of attention."""
    cfg = config(folder, tmp_path / "run")
    save, deaths = Store.save, [4, 6, 16]

    def save_then_die(store, step, items, loss):
        save(store, step, items, loss)
        if deaths and step == deaths[0]:
            deaths.pop(0)
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "save", save_then_die)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train(cfg)
    train(cfg)
    for step in (8, 20):
        again, expected = weights(cfg, step), weights(finished, step)
        for path, a in again.items():
            np.testing.assert_array_equal(a, expected[path], str(path))


def test_a_run_whose_past_was_changed_is_refused(finished):
    changed = dataclasses.replace(finished, stages=(), batch_size=6, attention="sparse")
    with pytest.raises(ValueError, match="data position: was saved with"):
        train(changed)


def test_a_plan_names_the_peak_of_the_learning_rate():
    """The first and the last step of a stage are far below the limit."""
    (stage,) = plan(get_config())
    first, peak, last = stage.learning_rate
    assert peak == pytest.approx(get_config().learning_rate)
    assert max(first, last) < peak / 5 and "peak 4.00e-03" in stage.row()[3]
