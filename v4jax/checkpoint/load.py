"""Reads a Hugging Face style directory into the parameter tree, one tensor at a time.

Reads official names and those that transformers 5 `save_pretrained` writes; float32, bfloat16, and
the fp8 and MXFP4 of DeepSeek's releases. All names, shapes and dtypes are compared with what
config.json implies before the first tensor is read.

Next file to read: v4jax/checkpoint/load_shards.py.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from v4jax.checkpoint.carried import check_carried, take_carried
from v4jax.checkpoint.files import Header, read_headers, read_tensor
from v4jax.checkpoint.formats import (
    Kind,
    Stored,
    allowed_kinds,
    check_stored,
    decode,
    float_scale,
    format_of,
    shapes_of,
)
from v4jax.checkpoint.names import (
    Path,
    check_table,
    fill_tree,
    official_shapes,
    plain_dtype,
    same_names,
    transformers_to_official,
)
from v4jax.checkpoint.store import is_run
from v4jax.config import ModelConfig
from v4jax.config.json_styles import read_config_json
from v4jax.config.releases import read_dspark, vision_layers
from v4jax.parameter_tree import spec_named
from v4jax.storage import Place, folder_of_checkpoint


class Source(NamedTuple):
    """A safetensors checkpoint whose headers fit its config.json.

    Attributes:
      cfg: the architecture.
      raw: the contents of config.json.
      kinds: official name -> how the tensor is stored.
      headers: official name -> place of the tensor.
      scales: official name -> place of its scales, for tensors that have some.
      carried: name -> place of what is no part of the trunk (checkpoint/carried.py).
      once: the files will not be read again soon (checkpoint/disk.py).
    """

    directory: Place
    cfg: ModelConfig
    raw: dict[str, Any]
    kinds: dict[str, Kind]
    headers: dict[str, Header]
    scales: dict[str, Header]
    carried: dict[str, Header] = {}
    once: bool = False

    @property
    def format(self) -> str:
        """One of formats.FORMATS."""
        return format_of(self.kinds)

    def stored(self, name: str) -> Stored:
        """The tensor as its file has it, after its values are checked.

        Raises:
          ValueError: naming the tensor: NaN codes or scales, ids of experts that do not exist.
        """
        return self._read(name, lambda kind, found: (check_stored(kind, found), found)[1])

    def numbers(self, name: str) -> np.ndarray:
        """The tensor's numbers: float32 or bfloat16 from low precision, otherwise as stored.

        Raises:
          ValueError: see `stored`.
        """
        return self._read(name, decode)

    def _read(self, name: str, use: Callable[[Kind, Stored], Any]) -> Any:
        found = Stored(
            read_tensor(self.headers[name], self.once),
            read_tensor(self.scales[name], self.once) if name in self.scales else None,
        )
        if spec_named(name).precision == "int64":
            check_table(self.cfg, f"{self.directory}: {name}", found.data)
        try:
            return use(self.kinds[name], found)
        except ValueError as error:
            raise ValueError(f"{self.directory}: {name}: {error}") from None

    def scale(self, name: str) -> np.ndarray | None:
        """The tensor's scales as float32; None in plain precision."""
        if name not in self.scales:
            return None
        return float_scale(self.kinds[name], read_tensor(self.scales[name]))


def open_safetensors(directory) -> Source:
    """Opens a directory with config.json and safetensors, and reads only the headers.

    The tensors are in one file, or in several with an index.

    Raises:
      ValueError: naming the file or tensor, what was expected and what was found.
    """
    directory = folder_of_checkpoint(directory, "directory", weights=True)
    cfg = read_config(directory)
    try:
        return _check_headers(directory, cfg, read_headers(directory))
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


def carried_of(directory) -> dict[str, Header]:
    """Name -> place of what a checkpoint of any kind has beside its trunk; {} for nothing.

    Raises:
      ValueError: see open_safetensors; or a run whose carried tensors do not fit its config.json.
    """
    small = folder_of_checkpoint(directory, "directory")
    raw = read_config_json(small / "config.json")
    if read_dspark(raw) is None and not vision_layers(raw):
        return {}
    directory = folder_of_checkpoint(directory, "directory", weights=True)
    if not is_run(directory):
        return open_safetensors(directory).carried
    return check_carried(ModelConfig.from_json(directory), raw, directory)


def load_safetensors(
    directory, dtype: Any = "float32", put: Callable[[Path, np.ndarray], Any] | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """(config, parameters) of a directory with config.json and safetensors of any precision.

    Args:
      dtype: "float32" or "bfloat16", of every *.weight. What files hold in float32 or int64
        (v4jax/parameters.py) is always float32.
      put: called with (path, array) when a leaf is complete; its result becomes the leaf. Without
        it leaves are NumPy arrays. Memory holds the tree, less what `put` moved away, and one
        tensor.

    Raises:
      ValueError: naming the file or tensor, what was expected and what was found.
    """
    dtype = plain_dtype(dtype)
    source = open_safetensors(directory)
    return source.cfg, fill_tree(source.cfg, source.numbers, dtype, put)


def read_config(directory) -> ModelConfig:
    """The architecture of a checkpoint directory.

    Where transformers wrote the directory, it includes the MTP module that transformers drops.

    Raises:
      ValueError: no such directory, or no config.json of a model this code can build.
    """
    return ModelConfig.from_json(folder_of_checkpoint(directory, "directory"))


# ---- checks --------------------------------------------------------------------------------------


def _check_headers(directory: Place, cfg: ModelConfig, found: dict[str, Header]) -> Source:
    """The source, if its tensors are those of `cfg`, less MTP where transformers dropped it.

    What is no part of the trunk is apart, as carried.
    """
    from_transformers = any(name.startswith("model.") for name in found)
    headers: dict[str, Header] = {}
    for name, header in found.items():
        official = transformers_to_official(name) if from_transformers else name
        if official in headers:
            raise ValueError(
                f"got both {headers[official].stored} and {name}, two names of {official}"
            )
        headers[official] = header
    mixed = [
        name for name in found if from_transformers and not name.startswith(("model.", "head."))
    ]
    if mixed:
        raise ValueError(
            f"got tensor {mixed[0]} beside names that begin with model.; must be all official, or "
            "all as transformers names them"
        )
    raw = read_config_json(directory / "config.json")
    carried = take_carried(cfg, raw, headers)
    cfg = _without_mtp(cfg, headers, from_transformers)
    implied = cfg.num_hidden_layers * (21 + 3 * cfg.n_routed_experts)
    if implied > max(4 * len(headers), 2000):  # too many even to list their names
        raise ValueError(f"got {len(headers)} tensors; config.json implies more than {implied}")
    shapes = official_shapes(cfg)
    scales = {
        weight: headers.pop(name)
        for name in list(headers)
        if name.endswith(".scale")
        and (weight := name.removesuffix("scale") + "weight") in shapes
        and allowed_kinds(weight)[2:]
    }
    same_names(shapes, {name: header.shape for name, header in headers.items()}, "tensor")
    kinds = {
        name: _check_kind(name, shape, headers[name], scales.get(name))
        for name, shape in shapes.items()
    }
    return Source(directory, cfg, raw, kinds, headers, scales, carried)


def _check_kind(name: str, shape: tuple[int, ...], header: Header, scale: Header | None) -> Kind:
    """How a tensor of `shape` is stored, if v4jax can read that."""
    kind, allowed = Kind(header.dtype, scale.dtype if scale else None), allowed_kinds(name)
    if kind not in allowed:
        dtypes = list(dict.fromkeys(one.dtype for one in allowed))
        if header.dtype not in dtypes:
            raise ValueError(f"tensor {name}: got {header.dtype}; allowed: {', '.join(dtypes)}")
        with_it = [str(one.scale) for one in allowed if one.dtype == header.dtype]
        what = f"{scale.dtype} scales" if scale else "no scales"
        raise ValueError(
            f"tensor {name}: got {header.dtype} with {what} ({name.removesuffix('weight')}scale); "
            f"allowed: {', '.join(with_it)}"
        )
    try:
        data, scale_shape = shapes_of(kind, shape)
    except ValueError as error:
        raise ValueError(f"tensor {name}: {error}") from None
    for got, expected, what in (
        (header, data, name),
        (scale, scale_shape, f"{name.removesuffix('weight')}scale"),
    ):
        if got and expected is not None and got.shape != expected:
            raise ValueError(
                f"tensor {what}: got shape {list(got.shape)}; must be {list(expected)}"
            )
    return kind


def _without_mtp(
    cfg: ModelConfig, tensors: dict[str, Header], from_transformers: bool
) -> ModelConfig:
    """Accepts a model whose MTP transformers dropped, and says so.

    See docs/equations.md#trap-31.
    """
    has_mtp = any(name.startswith("mtp.") for name in tensors)
    if from_transformers and not has_mtp and cfg.num_nextn_predict_layers:
        logging.getLogger("v4jax").warning(
            "transformers wrote no mtp.* tensors: loading without the MTP module"
        )
        ratios = cfg.compress_ratios[: cfg.num_hidden_layers]
        cfg = cfg.replace(num_nextn_predict_layers=0, compress_ratios=ratios)
    return cfg
