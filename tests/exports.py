"""Shared by tests of exports: a small model, its tensors by official name, their checkpoint."""

import json

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from trees import random_params, small_config

from v4jax.checkpoint import to_official

GATE = "layers.2.ffn.gate.tid2eid"
CFG = small_config()
PARAMS = random_params(CFG)
TENSORS = to_official(CFG, PARAMS)
BF16 = np.dtype(ml_dtypes.bfloat16)
INDEX = "model.safetensors.index.json"


def assert_same(got, expected):
    got, expected = flatten_dict(got), flatten_dict(expected)
    assert set(got) == set(expected)
    for path, leaf in expected.items():
        assert got[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(got[path], leaf, err_msg="/".join(path))


def write(directory, tensors=TENSORS, raw=None):
    """Writes a one-file checkpoint without `export`."""
    directory.mkdir(exist_ok=True)
    save_file(
        {name: np.ascontiguousarray(x) for name, x in tensors.items()},
        directory / "model.safetensors",
    )
    (directory / "config.json").write_text(json.dumps(CFG.to_dict() if raw is None else raw))
    return directory
