"""The weights of a store's newest intact checkpoint, compared with the model that asks for them.

Next file to read: v4jax/train/stability.py.
"""

from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from v4jax.checkpoint.store import CHECKPOINTS, Store


def load_store_params(directory, abstract, strict: bool = False) -> Any:
    """The public parameter dict of the newest intact checkpoint, placed and typed like `abstract`.

    Raises:
      ValueError: no complete checkpoint, none intact, or one of another model (names the first
        array that differs).
    """
    with Store(directory) as store:
        step = store.latest_intact(("params",), strict)
        if step is None:
            raise ValueError(f"{directory}: no complete checkpoint in {CHECKPOINTS}/")
        check_same_arrays(store.path(step), abstract)
        return store.load(step, {"params": abstract})["params"]


def check_same_arrays(path, abstract) -> None:
    """Raises ValueError if stored params differ from `abstract` in names, shapes or dtypes.

    Orbax would cast in silence.
    """
    stored = ocp.metadata(str(path), "params").metadata
    have = {_name(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(stored)}
    want = {_name(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    for name in sorted(have.keys() | want.keys()):
        if name not in have or name not in want:
            raise ValueError(
                f"{path}: array {name} is {'missing' if name in want else 'not part of the model'}"
            )
        if tuple(have[name].shape) != tuple(want[name].shape):
            raise ValueError(
                f"{path}: array {name} has shape {tuple(have[name].shape)}; the model needs "
                f"{want[name].shape}"
            )


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
