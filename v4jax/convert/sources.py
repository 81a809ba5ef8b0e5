"""Opens any checkpoint, so that its tensors can be read one by one.

Next file to read: v4jax/convert/targets.py.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from v4jax.adapters.base import refuse_adapters
from v4jax.checkpoint.carried import DRAFTER, VISION, check_carried, without_part
from v4jax.checkpoint.export import kinds_for, store_slot
from v4jax.checkpoint.files import Header, dtype_name, headers_of, read_tensor
from v4jax.checkpoint.formats import DTYPES, Kind, allowed_kinds, float_scale, format_of, shapes_of
from v4jax.checkpoint.load import Source, open_safetensors
from v4jax.checkpoint.names import Slot, official_names, official_shapes
from v4jax.checkpoint.store import is_run
from v4jax.checkpoint.stream import open_leaves
from v4jax.checkpoint.tensor_files import scale_name
from v4jax.config import ModelConfig
from v4jax.config.json_styles import read_config_json
from v4jax.config.releases import read_dspark, vision_layers, without_drafter, without_vision
from v4jax.parameter_tree import spec_named
from v4jax.storage import Place, folder_of_checkpoint
from v4jax.untrusted import file_in, read_json

RELEASED = "released"
"""Folder of a store for the source's scales, and for how the source stored each tensor."""


class StoreSource(NamedTuple):
    """The newest checkpoint of a v4jax store or run, read like a load.Source."""

    directory: Place
    cfg: ModelConfig
    raw: dict[str, Any]
    kinds: dict[str, Kind]
    slots: dict[str, Slot]
    leaves: dict[tuple[str, ...], Any]
    scales: dict[str, Header]
    carried: dict[str, Header] = {}

    @property
    def format(self) -> str:
        return format_of(self.kinds)

    def numbers(self, name: str) -> np.ndarray:
        slot = self.slots[name]
        leaf = self.leaves[slot.path]
        ids = spec_named(name).precision == "int64"
        kind = Kind("I64" if ids else dtype_name(leaf.dtype.numpy_dtype))
        try:
            read = leaf[slot.index].read().result()
        except ValueError as error:  # TensorStore's error for a chunk whose checksum is wrong
            raise ValueError(f"{self.directory}: {name} is damaged: {error}") from None
        return store_slot(self.cfg, name, kind, read, slot._replace(index=())).data

    def scale(self, name: str) -> np.ndarray | None:
        if name not in self.scales:
            return None
        return float_scale(self.kinds[name], read_tensor(self.scales[name], once=True))


def open_checkpoint(directory) -> Source | StoreSource:
    """Opens any checkpoint without reading its tensors.

    Raises:
      ValueError: no checkpoint, or one that does not fit its config.json.
    """
    directory = folder_of_checkpoint(directory, "directory", weights=True)
    refuse_adapters(directory, "v4jax convert {base} TARGET --adapter {adapter}")
    if not is_run(directory):
        return open_safetensors(directory)._replace(once=True)
    cfg = ModelConfig.from_json(directory)
    leaves = open_leaves(directory, cfg)
    kinds, scales = (
        kinds_for(
            cfg,
            "bfloat16"
            if any(leaf.dtype.numpy_dtype == DTYPES["BF16"] for leaf in leaves.values())
            else "float32",
        ),
        {},
    )
    if (directory / RELEASED).is_dir():
        try:
            kinds, scales = _read_form(directory / RELEASED, official_shapes(cfg))
        except ValueError as error:
            raise ValueError(f"{directory / RELEASED}: {error}") from None
    raw = read_config_json(directory / "config.json")
    carried = check_carried(cfg, raw, directory)
    return StoreSource(directory, cfg, raw, kinds, official_names(cfg), leaves, scales, carried)


def without_parts(source: Source | StoreSource, drop: Collection[str]) -> Source | StoreSource:
    """The checkpoint without its drafter (DSpark, or an MTP module) or its vision tower.

    Raises:
      ValueError: another word, or a part that the checkpoint does not have.
    """
    for part in drop:
        if part not in (DRAFTER, VISION):
            raise ValueError(f"drop: got {part!r}; allowed: {DRAFTER}, {VISION}")
        kept = without_part(source.carried, part)
        raw = without_drafter(source.raw) if part == DRAFTER else without_vision(source.raw)
        cfg = _trunk(source.cfg) if part == DRAFTER else source.cfg
        if cfg == source.cfg and kept == source.carried and not _described(source.raw, part):
            raise ValueError(f"drop: {source.directory} has no {part}")
        names = official_shapes(cfg)
        kinds = {name: source.kinds[name] for name in names}
        scales = {name: one for name, one in source.scales.items() if name in names}
        source = source._replace(cfg=cfg, raw=raw, kinds=kinds, scales=scales, carried=kept)
    return source


def _described(raw: Mapping[str, Any], part: str) -> bool:
    return (read_dspark(raw) is not None) if part == DRAFTER else vision_layers(raw) > 0


def _trunk(cfg: ModelConfig) -> ModelConfig:
    ratios = cfg.compress_ratios[: cfg.num_hidden_layers]
    return cfg.replace(num_nextn_predict_layers=0, compress_ratios=ratios)


def _read_form(
    directory: Place, shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Kind], dict[str, Header]]:
    """Reads what `_keep_form` wrote.

    Returns:
      Official name -> how the source stored it, and official name -> header of its scales.

    Raises:
      ValueError: the files do not belong to this model.
    """
    try:
        raw = read_json(file_in(directory, "kinds.json"))
        kinds = {
            name: next(kind for kind in allowed_kinds(name) if list(kind) == raw[name])
            for name in shapes
        }
        scale_shapes = {name: shapes_of(kind, shapes[name])[1] for name, kind in kinds.items()}
        low = {name: shape for name, shape in scale_shapes.items() if shape is not None}
        scales = (
            {one.stored: one for one in headers_of(file_in(directory, "scales.safetensors"))}
            if low
            else {}
        )
    except (FileNotFoundError, KeyError, TypeError, StopIteration) as error:
        raise ValueError(
            "kinds.json, or scales.safetensors, does not belong to this model "
            f"({type(error).__name__}: {error})"
        ) from None
    for name, shape in low.items():
        one = scales.get(scale_name(name))
        if one is None or (one.dtype, one.shape) != (kinds[name].scale, shape):
            raise ValueError(
                f"scales.safetensors: {scale_name(name)} is not {kinds[name].scale} {list(shape)}"
            )
    return kinds, {name: scales[scale_name(name)] for name in low}
