"""The parameter tree of a model, made from the table: its arrays, and what the table says of each.

Nothing is traced or computed, so this is quick for models of any size.

Next file to read: v4jax/checkpoint/names.py.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from v4jax.config import CSA, WINDOW_ONLY, LayerKind, ModelConfig
from v4jax.parameters import TABLE, ParamSpec

Path = tuple[str, ...]
"""The keys that lead to an array of the tree."""

ADAPTERS = "lora"
TEACHERS = "teachers"
"""The key of low-rank pairs in a dict of parameters, beside "router" (v4jax/adapters/tree.py)."""
NUMBERS = "adapters"
"""The key of several adapters' numbers by name, beside ADAPTERS (v4jax/adapters/several.py)."""
ROWS = "adapter_rows"
"""The key of the number of each row's adapter, int32 [B], which programs of decoding get beside
ADAPTERS; -1 for a row without one."""
MTP_KIND = LayerKind(WINDOW_ONLY, hash_routed=False)
_BY_PATH = {spec.path: spec for spec in TABLE}
_BY_NAME = {spec.official: spec for spec in TABLE}
_BLOCK = re.compile(r"(layers_\d+_\d+(_\d+)?/block_\d+|mtp/block|dspark/stage_\d+)/")
_AS_IN_MTP = {"dspark/main_norm/": "mtp/enorm/", "dspark/norm/": "mtp/norm/"}
_AS_IN_MTP |= {"dspark/hc_head/": "mtp/hc_head/"}
"""What a DSpark drafter has beside its stages -> what MTP has of the same kind and size."""
_LAYER = re.compile(r"^(layers\.\d+|mtp\.0)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")


class Leaf(NamedTuple):
    """One array of the parameter tree.

    Attributes:
      spec: its line of the table.
      shape: its shape; a group of layers is stacked along the first axis, "layers".
      axes: the logical name of each axis.
      in_mtp: whether MTP's module has it.
    """

    spec: ParamSpec
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    in_mtp: bool


class Block(NamedTuple):
    """Layers of one kind that are stacked in the tree.

    Attributes:
      path: their place, such as "layers_3_42/block_1".
      layers: their official names, in order: "layers.4", "layers.6", ...; "mtp.0" of MTP, which is
        not stacked.
    """

    path: str
    kind: LayerKind
    layers: tuple[str, ...]

    @property
    def is_stacked(self) -> bool:
        return self.layers != ("mtp.0",)


def blocks(cfg: ModelConfig) -> Iterator[Block]:
    """Every block of the tree."""
    for group in cfg.layer_groups:
        for i, kind in enumerate(group.kinds):
            numbers = range(group.first + i, cfg.num_hidden_layers, len(group.kinds))
            layers = tuple(f"layers.{number}" for number in numbers[: group.repeats])
            yield Block(f"{group.name}/block_{i}", kind, layers)
    if cfg.num_nextn_predict_layers:
        yield Block("mtp/block", MTP_KIND, ("mtp.0",))


def layer_specs(kind: LayerKind) -> tuple[ParamSpec, ...]:
    """The parameters of a layer of this kind."""
    has = {
        "block": True,
        "compressed": kind.compress_ratio != WINDOW_ONLY,
        "csa": kind.compress_ratio == CSA,
        "hash": kind.hash_routed,
        "score": not kind.hash_routed,
    }
    return tuple(spec for spec in TABLE if has.get(spec.where, False))


def single_specs(cfg: ModelConfig) -> tuple[ParamSpec, ...]:
    """The parameters outside of all layers, those of MTP's module included."""
    places = ("model", "mtp") if cfg.num_nextn_predict_layers else ("model",)
    return tuple(spec for spec in TABLE if spec.where in places)


def spec_of(path: Path) -> ParamSpec:
    """The line of the table for an array of the tree.

    Example: ("layers_3_42", "block_1", "attn", "wq_a") is the line {block}/attn/wq_a. The arrays of
    its low-rank pair, ("lora", ..., "wq_a", "a") and "b", have the same line.

    Raises:
      ValueError: a path of no parameter.
    """
    if path[0] == ADAPTERS:
        path = path[1:-1]
    name = _BLOCK.sub("{block}/", "/".join(path), count=1)
    for own, same in _AS_IN_MTP.items():
        name = name.replace(own, same, 1) if name.startswith(own) else name
    spec = _BY_PATH.get(name)
    if spec is None:
        raise ValueError(f"{'/'.join(path)}: not a parameter of the model")
    return spec


def spec_named(official: str) -> ParamSpec:
    """The line of the table for a tensor of a released file.

    Example: mtp.0.ffn.experts.3.w1.weight is the line {layer}.ffn.experts.{e}.w1.weight.

    Raises:
      ValueError: a name of no tensor.
    """
    general = _EXPERT.sub(".experts.{e}.", _LAYER.sub("{layer}.", official))
    spec = _BY_NAME.get(official) or _BY_NAME.get(general)
    if spec is None:
        raise ValueError(f"{official}: not a tensor of the model")
    return spec


@functools.cache
def leaves(cfg: ModelConfig) -> Mapping[Path, Leaf]:
    """Every array of the tree by its path, in the order of jax.tree."""
    found = {}
    for spec in single_specs(cfg):
        found[tuple(spec.path.split("/"))] = Leaf(
            spec, spec.size(cfg), spec.axes, spec.where == "mtp"
        )
    for block in blocks(cfg):
        count = (len(block.layers),) if block.is_stacked else ()
        layers = ("layers",) if block.is_stacked else ()
        for spec in layer_specs(block.kind):
            path = tuple(spec.path.format(block=block.path).split("/"))
            size = spec.size(cfg, block.kind.compress_ratio)
            found[path] = Leaf(spec, count + size, layers + spec.axes, not block.is_stacked)
    return dict(sorted(found.items()))


def abstract_params(cfg: ModelConfig):
    """Shapes and dtypes of the parameters (jax.ShapeDtypeStruct), without computing anything."""
    return unflatten_dict(
        {path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for path, leaf in leaves(cfg).items()}
    )


def param_axes(cfg: ModelConfig):
    """Logical axes of the parameters: the same tree, a tuple of names (or None) for each array."""
    return unflatten_dict({path: leaf.axes for path, leaf in leaves(cfg).items()})
