"""Opens a checkpoint of any kind, on one device or directly on a mesh.

Next file to read: v4jax/score.py.
"""

import math

import jax
import numpy as np
from jax.sharding import Mesh

from sharding.mesh import make_mesh, parse_mesh
from sharding.params import named_shardings
from sharding.processes import check_whole
from sharding.rules import AxisRules, check_has_mesh, layout_for
from v4jax.checkpoint.load import load_safetensors, open_safetensors
from v4jax.checkpoint.load_shards import load_shards
from v4jax.checkpoint.names import leaf_dtypes, plain_dtype
from v4jax.checkpoint.store import is_run
from v4jax.checkpoint.store_params import load_store_params
from v4jax.config import ModelConfig
from v4jax.generation_config import with_end_tokens
from v4jax.parameter_tree import abstract_params, param_axes
from v4jax.python_files import read_layout
from v4jax.storage import checkpoint_path, folder_of_checkpoint, is_remote


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
    path, dtype: str = "float32", mesh: str | None = None, layout: AxisRules | str | None = None
):
    """Opens a safetensors directory or a v4jax run: (ModelConfig, nested dict of jax arrays).

    The config's eos_token_ids are those of config.json and of generation_config.json together.

    Args:
      path: a directory with config.json and *.safetensors, or a v4jax run or store; or one of a
        bucket (gs://, s3://), or a model of the Hub (org/name[@revision]).
      dtype: "float32" or "bfloat16", of every *.weight; what official files keep in float32 stays
        float32.
      mesh: axis sizes such as "data=2,expert=4"; None: one device.
      layout: how the arrays lie on the mesh: a name, an AxisRules (sharding.rules.layout), or
        "FILE.py:NAME"; None: "full".

    Raises:
      ValueError: no such checkpoint, or anything in it that does not fit, naming the tensor.
    """
    plain_dtype(dtype)
    path = folder_of_checkpoint(path, "path", weights=True)
    cfg = ModelConfig.from_json(path)
    device_mesh, rules = place_on(mesh, layout)
    if not is_run(path):
        cfg = open_safetensors(path).cfg  # without MTP if transformers wrote it
    ending = with_end_tokens(cfg, path)
    places = named_shardings(device_mesh, rules, abstract_params(cfg), param_axes(cfg))
    return ending, load_onto(path, cfg, dtype, places)


def load_onto(path, cfg: ModelConfig, dtype: str, places):
    """Loads the parameters of a checkpoint of any kind, each array directly to its devices.

    Args:
      cfg: the config of the checkpoint.
      places: tree of shardings, shaped like the parameters.

    Raises:
      ValueError: see load; or a model with MTP whose checkpoint has none.
    """
    if is_run(path):
        return _load_run(path, cfg, dtype, places)

    def put(where: tuple[str, ...], array: np.ndarray):
        place = places
        for key in where:
            place = place[key]
        return jax.make_array_from_callback(array.shape, place, lambda index: array[index])

    folder = checkpoint_path(path, "path", weights=True)
    if is_remote(folder):
        source = open_safetensors(folder)
        found, params = source.cfg, load_shards(source, dtype, places)
    else:
        found, params = load_safetensors(folder, dtype, put)
    if found.difference(cfg):
        raise ValueError(f"{path}: has no MTP module; this model has one")
    return params


def _load_run(path, cfg: ModelConfig, dtype: str, places):
    dtypes = leaf_dtypes(cfg, dtype)

    def typed(where, leaf, place):
        return jax.ShapeDtypeStruct(
            leaf.shape, dtypes[tuple(key.key for key in where)], sharding=place
        )

    return load_store_params(
        path, jax.tree_util.tree_map_with_path(typed, abstract_params(cfg), places)
    )
