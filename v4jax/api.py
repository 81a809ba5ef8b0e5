"""Opens a checkpoint of any kind, on one device or directly on a mesh.

Next file to read: v4jax/score.py.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sharding.mesh import make_mesh, parse_mesh
from sharding.params import named_shardings
from sharding.processes import check_whole
from sharding.rules import AxisRules, check_has_mesh, layout_for
from v4jax.adapters.base import refuse_adapters
from v4jax.adapters.read import load_adapter
from v4jax.adapters.several import together
from v4jax.adapters.tree import axes_like
from v4jax.checkpoint.load import open_safetensors
from v4jax.checkpoint.load_shards import load_shards
from v4jax.checkpoint.names import leaf_dtypes, plain_dtype
from v4jax.checkpoint.packed_parts import formats_of
from v4jax.checkpoint.store import is_run
from v4jax.checkpoint.store_params import load_store_params
from v4jax.config import ModelConfig
from v4jax.generation_config import with_end_tokens
from v4jax.packed_tree import Formats, packed_shardings
from v4jax.parameter_tree import ADAPTERS, NUMBERS, abstract_params, param_axes
from v4jax.python_files import read_layout
from v4jax.storage import checkpoint_path, folder_of_checkpoint

PACKED = "packed"
"""The dtype of `load` that leaves fp8 and MXFP4 as they are."""


def place_on(mesh: str | None, layout: AxisRules | str | None) -> tuple[Mesh, AxisRules]:
    """The mesh of a spec such as "data=2,expert=4", and its rules.

    Without a spec it is one device with empty rules.

    Raises:
      ValueError: a layout without a mesh; see also parse_mesh, make_mesh, read_layout and
        layout_for.
    """
    layout = read_layout(layout)
    check_has_mesh(layout, mesh)
    sizes = parse_mesh(mesh)
    one = math.prod(sizes.values()) == 1
    rules = layout_for(layout, sizes)
    device_mesh = make_mesh(sizes)
    check_whole(device_mesh)
    return device_mesh, AxisRules() if one else rules


def load(
    path,
    dtype: str = "float32",
    mesh: str | None = None,
    layout: AxisRules | str | None = None,
    adapter: Any = None,
):
    """Opens a safetensors directory or a v4jax run: (ModelConfig, nested dict of jax arrays).

    The config's eos_token_ids are those of config.json and of generation_config.json together.

    Args:
      path: a directory with config.json and *.safetensors, or a v4jax run or store; or one of a
        bucket (gs://, s3://), or a model of the Hub (org/name[@revision]).
      dtype: "float32" or "bfloat16", of every *.weight; what official files keep in float32 stays
        float32. Or "packed": what safetensors hold in fp8 or MXFP4 stays so on the devices
        (v4jax/quant/packed.py) and is read where the model uses it; the rest is bfloat16.
      mesh: axis sizes such as "data=2,expert=4"; None: one device.
      layout: how the arrays lie on the mesh: a name, an AxisRules (sharding.rules.layout), or
        "FILE.py:NAME"; None: "full".
      adapter: a folder of a low-rank adapter (docs/lora.md), whose pairs come under "lora"; or
        several folders by name, {"sql": DIR, "chat": DIR}, from which each prompt of `generate`
        chooses (v4jax/adapters/several.py).

    Raises:
      ValueError: no such checkpoint, or anything in it that does not fit, naming the tensor.
    """
    check_dtype(dtype)
    given = path
    path = folder_of_checkpoint(path, "path", weights=True)
    refuse_adapters(path, 'v4jax.load("{base}", adapter="{adapter}")')
    cfg = ModelConfig.from_json(path)
    device_mesh, rules = place_on(mesh, layout)
    if not is_run(path):
        cfg = open_safetensors(path).cfg  # without MTP if transformers wrote it
    ending = with_end_tokens(cfg, path)
    low = {}
    if adapter is not None:  # refused before the long work
        pairs, numbers = _read_adapters(cfg, adapter, str(given))
        axes = axes_like(cfg, pairs)
        places = named_shardings(device_mesh, rules, pairs, axes)
        low = {ADAPTERS: jax.tree.map(_placed, pairs, places)} | numbers
    places = places_of(path, cfg, dtype, device_mesh, rules)
    return ending, load_onto(path, cfg, dtype, places) | low


def _read_adapters(cfg: ModelConfig, adapter: Any, base: str) -> tuple[Any, dict[str, Any]]:
    """(pairs of one adapter, {}), or of several with {"adapters": their numbers}.

    Raises:
      ValueError: no adapter, a name that is no text, or see load_adapter.
    """
    if not isinstance(adapter, Mapping):
        return load_adapter(cfg, adapter, base), {}
    for name in adapter or [None]:
        if not isinstance(name, str) or not name:
            got = "no adapter" if name is None else f"the name {name!r}"
            raise ValueError(f"adapter: got {got}; must be a folder, or names and their folders")
    pairs, numbers = together(
        {name: load_adapter(cfg, folder, base) for name, folder in adapter.items()}
    )
    return pairs, {NUMBERS: numbers}


def _placed(array: np.ndarray, place) -> jax.Array:
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def check_dtype(dtype) -> None:
    """Raises ValueError unless `dtype` is one that `load` takes."""
    if dtype != PACKED:
        try:
            plain_dtype(dtype)
        except ValueError:
            allowed = f"'float32', 'bfloat16', {PACKED!r}"
            raise ValueError(f"dtype: got {dtype!r}; allowed: {allowed}") from None


def compute_dtype(dtype: str) -> str:
    """The dtype of products with weights loaded as `dtype`: bfloat16 with packed ones."""
    return "bfloat16" if dtype == PACKED else dtype


def places_of(path, cfg: ModelConfig, dtype: str, mesh: Mesh, rules: AxisRules):
    """The sharding of every array that `load_onto` makes of this checkpoint.

    Raises:
      ValueError: a layout that does not fit the sizes, or would cut blocks of packed weights; or
        packed weights asked of a run, which has none.
    """
    if dtype != PACKED:
        return named_shardings(mesh, rules, abstract_params(cfg), param_axes(cfg))
    return packed_shardings(mesh, rules, cfg, packed_formats(path))


def packed_formats(path) -> Formats:
    """Which arrays of a checkpoint are packed, and how.

    Raises:
      ValueError: none are, as in a v4jax run, or one array has tensors of different formats.
    """
    if is_run(path):
        raise ValueError(
            f"dtype: got {PACKED!r} for {path}, a v4jax run, which holds no fp8 or MXFP4; convert "
            "it first (v4jax convert RUN DIR --format safetensors --dtype official)"
        )
    formats = formats_of(open_safetensors(folder_of_checkpoint(path, "path", weights=True)))
    if not formats:
        raise ValueError(
            f"dtype: got {PACKED!r} for {path}, which holds no fp8 or MXFP4; allowed: 'float32', "
            "'bfloat16'"
        )
    return formats


def load_onto(path, cfg: ModelConfig, dtype: str, places):
    """Loads the parameters of a checkpoint of any kind, each array directly to its devices.

    Of safetensors a process reads what its devices hold, piece by piece.

    Args:
      cfg: the config of the checkpoint.
      places: tree of shardings, as places_of returns it.

    Raises:
      ValueError: see load; or a run of adapters, or a model with MTP whose checkpoint has none.
    """
    if is_run(path):
        refuse_adapters(checkpoint_path(path, "path", weights=True))
        return _load_run(path, cfg, dtype, places)

    source = open_safetensors(checkpoint_path(path, "path", weights=True))
    if source.cfg.difference(cfg):
        raise ValueError(f"{path}: has no MTP module; this model has one")
    return load_shards(source, dtype, places)


def _load_run(path, cfg: ModelConfig, dtype: str, places):
    dtypes = leaf_dtypes(cfg, dtype)

    def typed(where, leaf, place):
        return jax.ShapeDtypeStruct(
            leaf.shape, dtypes[tuple(key.key for key in where)], sharding=place
        )

    return load_store_params(
        path, jax.tree_util.tree_map_with_path(typed, abstract_params(cfg), places)
    )
