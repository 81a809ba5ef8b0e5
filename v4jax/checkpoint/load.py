"""Reads a Hugging Face style directory into the parameter tree, tensor by tensor, after checking every header.

Reads official names and what transformers 5 `save_pretrained` writes, float32 and bfloat16. All names, shapes and
dtypes are compared with what config.json implies before the first tensor is read.

Next file to read: v4jax/checkpoint/export.py.
"""

import contextlib
import json
import logging
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from v4jax.checkpoint.names import (
    Path,
    check_shapes,
    check_table,
    fill_tree,
    official_names,
    plain_dtype,
    transformers_to_official,
)
from v4jax.config import ModelConfig

INDEX_FILE = "model.safetensors.index.json"
_LOW_PRECISION = re.compile(r"F8_|F6_|F4|I8$|U8$")
_PLAIN, _TABLE_DTYPES = ("F32", "BF16"), ("I64", "I32")


class _Tensor(NamedTuple):
    """A tensor's header and where to read it; `stored` is its name in the file."""

    file: Any
    stored: str
    shape: tuple[int, ...]
    dtype: str


def load_safetensors(
    directory, dtype: Any = "float32", put: Callable[[Path, np.ndarray], Any] | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """(config, parameters) of a directory with config.json and safetensors: one file, or several with an index.

    Args:
      dtype: "float32" or "bfloat16", of every *.weight; hc_*, attn_sink, ape, bias and tid2eid are always float32.
      put: called with (path, array) as each leaf is complete; its result takes the leaf's place in the tree. Without it
        leaves are NumPy arrays. Never more is held than the tree, less what `put` took, and one tensor.

    Raises:
      ValueError: naming the file or tensor, what was expected and what was found.
    """
    directory = pathlib.Path(directory)
    dtype = plain_dtype(dtype)
    cfg = read_config(directory)
    with contextlib.ExitStack() as open_files:
        try:
            cfg, tensors = _check_headers(cfg, _read_headers(directory, open_files))
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None

        def read(name: str) -> np.ndarray:
            array = tensors[name].file.get_tensor(tensors[name].stored)
            if name.endswith(".tid2eid"):
                check_table(cfg, f"{directory}: {name}", array)
            return array

        return cfg, fill_tree(cfg, read, dtype, put)


def read_config(directory) -> ModelConfig:
    """The architecture of a checkpoint directory; of what transformers wrote, with the MTP module that it drops.

    Raises:
      ValueError: no such directory, or no config.json of a model this code can build.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: not a directory; expected one with config.json and *.safetensors")
    return ModelConfig.from_json(directory)


# ---- files -----------------------------------------------------------------------------------------------------------


def _read_headers(directory: pathlib.Path, open_files: contextlib.ExitStack) -> dict[str, _Tensor]:
    """Name in the file -> header, of all files."""
    weight_map = _read_index(directory)
    if weight_map is None:
        files = sorted(path.name for path in directory.glob("*.safetensors"))
        if len(files) != 1:
            raise ValueError(f"got {len(files)} *.safetensors files and no {INDEX_FILE}; expected one, or an index")
    else:
        files = sorted(set(weight_map.values()))
    tensors = {}
    for name in files:
        try:
            file = open_files.enter_context(safe_open(directory / name, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{name}: not a readable safetensors file: {error}") from None
        for stored in file.keys():
            if weight_map is not None and weight_map.get(stored) != name:
                raise ValueError(f"{name}: holds {stored}, which {INDEX_FILE} places in {weight_map.get(stored)}")
            header = file.get_slice(stored)
            tensors[stored] = _Tensor(file, stored, tuple(header.get_shape()), header.get_dtype())
    for stored, name in (weight_map or {}).items():
        if stored not in tensors:
            raise ValueError(f"{name}: lacks {stored}, which {INDEX_FILE} places there")
    return tensors


def _read_index(directory: pathlib.Path) -> dict[str, str] | None:
    """Tensor -> file of model.safetensors.index.json, or None where there is none."""
    path = directory / INDEX_FILE
    if not path.exists():
        return None
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f'{INDEX_FILE}: expected a JSON object with "weight_map": tensor -> file') from None
    for name in files:
        if not isinstance(name, str) or pathlib.PurePath(name).name != name:
            raise ValueError(f"{INDEX_FILE}: got file {name!r}; must be a file name in this directory")
        if not (directory / name).is_file():
            raise ValueError(f"{INDEX_FILE}: names {name}, which does not exist")
    if "model.safetensors" not in files and (directory / "model.safetensors").exists():
        raise ValueError(f"got model.safetensors, and {INDEX_FILE} that does not name it; remove the one not meant")
    return weight_map


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_headers(cfg: ModelConfig, stored: dict[str, _Tensor]) -> tuple[ModelConfig, dict[str, _Tensor]]:
    """Official name -> header, if these are the tensors of `cfg`; and `cfg`, less MTP where transformers dropped it."""
    for name, tensor in stored.items():
        if name.endswith(".scale") or _LOW_PRECISION.match(tensor.dtype):
            raise ValueError(
                f"tensor {name}: got {tensor.dtype}, part of an fp8 or MXFP4 checkpoint; low-precision files come with "
                f"a later release; allowed: {', '.join(_PLAIN)}"
            )
    from_transformers = any(name.startswith("model.") for name in stored)
    tensors: dict[str, _Tensor] = {}
    for name, tensor in stored.items():
        official = transformers_to_official(name) if from_transformers else name
        if official in tensors:
            raise ValueError(f"got both {tensors[official].stored} and {name}, two names of {official}")
        tensors[official] = tensor
    cfg = _check_mtp(cfg, tensors, from_transformers)
    check_shapes(cfg, {name: tensor.shape for name, tensor in tensors.items()})
    for name in official_names(cfg):
        allowed = _TABLE_DTYPES if name.endswith(".tid2eid") else _PLAIN
        if tensors[name].dtype not in allowed:
            raise ValueError(f"tensor {name}: got {tensors[name].dtype}; allowed: {', '.join(allowed)}")
    return cfg, tensors


def _check_mtp(cfg: ModelConfig, tensors: dict[str, _Tensor], from_transformers: bool) -> ModelConfig:
    """Refuses a DSpark drafter (pitfall 33); accepts that transformers drops MTP, and says so."""
    mtp = [name for name in tensors if name.startswith("mtp.")]
    later = [name for name in mtp if not name.startswith("mtp.0.")]
    if later or (mtp and "mtp.0.enorm.weight" not in tensors):
        raise ValueError(
            f"tensor {(later or mtp)[0]}: this checkpoint's mtp.* is a DSpark drafter, which v4jax does not build; "
            "allowed: one MTP module with mtp.0.enorm.weight"
        )
    if from_transformers and not mtp and cfg.num_nextn_predict_layers:
        logging.getLogger("v4jax").warning("transformers wrote no mtp.* tensors: loading without the MTP module")
        ratios = cfg.compress_ratios[: cfg.num_hidden_layers]
        cfg = cfg.replace(num_nextn_predict_layers=0, compress_ratios=ratios)
    return cfg
