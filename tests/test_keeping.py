"""A deletion that was cut is finished by the process that goes on, and nothing else goes."""

import pathlib
import shutil

import numpy as np
import pytest

from v4jax.checkpoint.store import Store

TREE = {"params": {"w": np.arange(6.0).reshape(2, 3)}, "optimizer": {"m": np.zeros(3)}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of checkpoints 2, 3 and 4, of which 3 has the least loss."""
    folder = tmp_path_factory.mktemp("saved")
    with Store(folder, keep=9, writes=True) as store:
        for step, loss in ((2, 3.0), (3, 1.0), (4, 2.0)):
            store.save(step, TREE, loss)
            store.wait()
    return folder


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def steps_after(run, **keep) -> set[str]:
    """Names of the checkpoints that a process leaves which only begins."""
    with Store(run, writes=True, **keep) as store:
        assert store.latest_intact() == 4
        store.remove_leftovers()
        assert np.array_equal(store.load(4, TREE)["params"]["w"], TREE["params"]["w"])
    return {path.name for path in (run / "checkpoints").iterdir()}


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("order", ["first to last", "last to first"])
def test_a_deletion_cut_after_any_file_is_finished(run, order):
    whole = run.with_name("whole")
    (run / "checkpoints" / "3").rename(whole)
    count = len(files_of(run / "checkpoints" / "2"))
    for cut in range(count + 1):
        files = files_of(run / "checkpoints" / "2")
        for path in (files if order == "first to last" else files[::-1])[:cut]:
            path.unlink()
        assert steps_after(run, keep=1) == {"4"}, cut
        shutil.copytree(whole, run / "checkpoints" / "2")  # some whole checkpoint to cut


def test_a_save_leaves_its_items_as_they_are_so_it_can_be_repeated(run):
    items = dict(TREE)
    with Store(run, keep=9, writes=True) as store:
        store.save(5, items, 1.0)
    assert items.keys() == TREE.keys()


def test_what_any_rule_keeps_stays_and_a_reader_removes_nothing(run):
    with Store(run, keep=1) as store:
        assert store.latest == 4
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"2", "3", "4"}
    assert steps_after(run, keep=3) == {"2", "3", "4"}
    assert steps_after(run, keep=1, keep_best=1, keep_every=2) == {"2", "3", "4"}
    assert steps_after(run, keep=1, keep_best=1) == {"3", "4"}
